"""A folder has one writer at a time, and a dead one holds nothing."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from convfusion.errors import ConvFusionError
from convfusion.locks import LOCK, locked

HOLD = """
import sys, time
from convfusion.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_writes(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConvFusionError, match=f"written into by process {other.pid} on "):
            locked(tmp_path).__enter__()
        other.kill()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):  # what a killed process leaves behind holds nothing
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_one_process_does_not_write_twice(tmp_path):
    with locked(tmp_path):
        for name in (tmp_path, tmp_path / ".." / tmp_path.name):
            with pytest.raises(ConvFusionError, match=f"process {os.getpid()}, this one"):
                locked(name).__enter__()
    with locked(tmp_path):
        pass


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["file"]


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    with locked(tmp_path):
        worker = context.Process(target=ended.wait)
        worker.start()
    try:
        with locked(tmp_path):
            pass
    finally:
        ended.set()
        worker.join()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConvFusionError, match="inside cannot be written into"),
        locked(tmp_path / "file" / "inside"),
    ):
        pass
