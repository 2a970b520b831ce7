"""A folder has one writer at a time, and a dead one holds nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image
from tiny_pipelines import stable_diffusion

from convfusion.data import build_cache, open_source
from convfusion.data.chunks import Reader, read_events
from convfusion.errors import ConvFusionError
from convfusion.folders import LOCK, locked

HOLD = """
import sys, time
from convfusion.folders import locked
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


def test_one_process_builds_a_cache(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red apple")
    pipe, source, out = stable_diffusion(), open_source(str(tmp_path)), tmp_path / "cache"
    with locked(out), pytest.raises(ConvFusionError, match="is being written into by process"):
        build_cache(pipe, source, out)
    assert not out.exists()
    assert len(build_cache(pipe, source, out)) == 1
    with locked(out):  # which is complete, and only read
        assert len(build_cache(pipe, source, out)) == 1


def test_workers_leave_interrupts_to_the_main_process(tmp_path):
    for i in range(130):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
        (tmp_path / f"{i:03d}.txt").write_text("red apple")
    source = open_source(str(tmp_path))
    events = read_events(Reader(source, [(16, 16)], [(unit, 0) for unit in range(source.units)]), 2)
    found = [next(events), next(events)]  # one of each worker: both are at work
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    found += events
    assert len(found) == 130 + source.units
