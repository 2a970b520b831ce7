"""What is written to disk: whole or not at all, and nothing beside it is touched."""

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import CheckpointError, ConvFusionError, files, folders
from convfusion.checkpoint import pipelines
from convfusion.files import write_tensors, write_text


@pytest.fixture
def pipe():
    found = stable_diffusion()
    convfusion.convert(found)
    return found


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_lies_beside_a_pipeline_stays(pipe, tmp_path):
    for name in ("X.old", "X.writing", "X.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = tree(tmp_path)
    convfusion.save_pipeline(pipe, tmp_path / "X")
    convfusion.save_pipeline(pipe, tmp_path / "X")  # over itself
    assert [name for name in tree(tmp_path) if name.split("/")[0] != "X"] == before
    assert not [path for path in tmp_path.rglob("*") if folders.is_unfinished(path)]
    convfusion.load_pipeline(tmp_path / "X")


@pytest.mark.parametrize(
    "mine",
    ["notes.txt", "unet/mine.safetensors", "other/weights", "convfusion/README.md", "empty/"],
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_folder_with_files_of_others_is_refused_by_name(pipe, tmp_path, mine, ours):
    place = tmp_path / "X"
    if ours:
        convfusion.save_pipeline(pipe, place)
    (place / mine).parent.mkdir(parents=True, exist_ok=True)
    (place / mine).mkdir() if mine.endswith("/") else (place / mine).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ConvFusionError, match=rf"X holds {mine.split('/')[0]}.*another folder"):
        convfusion.save_pipeline(pipe, place)
    assert tree(tmp_path) == before


def test_a_link_within_a_pipeline_is_refused(pipe, tmp_path):
    convfusion.save_pipeline(pipe, tmp_path / "X")
    (tmp_path / "X" / "vae").rename(tmp_path / "disk")
    (tmp_path / "X" / "vae").symlink_to(tmp_path / "disk")
    with pytest.raises(ConvFusionError, match="holds vae"):
        convfusion.save_pipeline(pipe, tmp_path / "X")
    assert (tmp_path / "disk" / "config.json").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_filled(pipe, tmp_path, there):
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "X").symlink_to(tmp_path / "disk")
    (tmp_path / "b").symlink_to(tmp_path / "blocks")
    for _ in range(2):
        convfusion.save_pipeline(pipe, tmp_path / "X")
        convfusion.save(pipe, tmp_path / "b")
    assert (tmp_path / "X").is_symlink() and (tmp_path / "b").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"X", "b", "disk", "blocks"}
    convfusion.load_pipeline(tmp_path / "disk")
    convfusion.load(stable_diffusion(), tmp_path / "blocks")


def test_the_working_directory_may_be_the_target(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convfusion.save_pipeline(pipe, ".")
    convfusion.load_pipeline(".")


def test_a_file_in_the_way_is_refused(pipe, tmp_path):
    (tmp_path / "X").write_text("mine")
    with pytest.raises(ConvFusionError, match="it is a file"):
        convfusion.save_pipeline(pipe, tmp_path / "X")
    assert (tmp_path / "X").read_text() == "mine"


def test_blocks_leave_the_other_files_of_their_folder(pipe, tmp_path):
    (tmp_path / "notes").write_text("mine")
    convfusion.save(pipe, tmp_path)
    assert tree(tmp_path) == ["blocks.safetensors", "convfusion.json", "notes"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left"), Exception("x")]
)
@pytest.mark.parametrize("there", [True, False])
def test_what_fails_leaves_nothing_and_spoils_nothing(pipe, tmp_path, monkeypatch, error, there):
    place = tmp_path / "new" / "X"
    if there:
        convfusion.save_pipeline(pipe, place)
    before = tree(tmp_path)

    def fail(folder):
        raise error

    monkeypatch.setattr(pipe.scheduler, "save_pretrained", fail)
    expected = type(error) if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected) as raised:
        convfusion.save_pipeline(pipe, place)
    assert tree(tmp_path) == before
    assert isinstance(error, KeyboardInterrupt) or f"{place} cannot be written" in str(raised.value)


def test_a_move_that_fails_is_undone(pipe, tmp_path, monkeypatch):
    convfusion.save_pipeline(pipe, tmp_path / "X")
    before, rename, moves = tree(tmp_path), os.rename, []

    def fail_at_the_ninth(source, target):
        moves.append(source)
        if len(moves) == 9:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", fail_at_the_ninth)
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
        convfusion.save_pipeline(pipe, tmp_path / "X")
    assert tree(tmp_path) == before
    convfusion.load_pipeline(tmp_path / "X")


@pytest.mark.parametrize("moves", range(0, 14, 2))
def test_after_a_kill_between_two_moves_there_is_a_whole_pipeline_or_none(
    pipe, tmp_path, monkeypatch, moves
):
    place, rename, done = tmp_path / "X", os.rename, []
    convfusion.save_pipeline(pipe, place)

    def kill(source, target):
        if len(done) == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(source)
        rename(source, target)

    child = os.fork()
    if child == 0:
        folders.os.rename = kill
        convfusion.save_pipeline(pipe, place)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if moves:
        with pytest.raises(CheckpointError, match=r"is no (converted )?pipeline"):
            convfusion.load_pipeline(place)
        assert not (place / "model_index.json").exists()  # nor one for diffusers
    convfusion.save_pipeline(pipe, place)  # what the kill left is in nobody's way
    convfusion.load_pipeline(place)
    assert not [path for path in place.iterdir() if folders.is_unfinished(path)]


def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(pipe, tmp_path):
    host = folders.unfinished_name().split("-")[1]
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    names = {who: f".convfusion-{host}-{who}-{'0' * 16}.tmp" for who in (ended, str(os.getpid()))}
    elsewhere = f".convfusion-{'0' * 8}-{ended}-{'0' * 16}.tmp"
    for name in (*names.values(), elsewhere, "mine.tmp"):
        (tmp_path / name).write_text("x")
    convfusion.save(pipe, tmp_path)
    assert not (tmp_path / names[ended]).exists()
    assert all((tmp_path / name).exists() for name in (names[str(os.getpid())], elsewhere))
    assert (tmp_path / "mine.tmp").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_all_that_is_written_has_the_mode_of_a_new_file(pipe, tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        write_text(tmp_path / "a.json", "{}")
        convfusion.save_pipeline(pipe, tmp_path / "X")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~mask}
    held = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "X").rglob("*") if p.is_dir()}
    assert held == {0o777 & ~mask}


def test_two_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / ("x" * 250)  # the longest name that there is
    with files._aside(path) as first, files._aside(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # which was the last to be done
    assert tree(tmp_path) == [path.name]


def test_a_linked_file_is_written_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "b.json")
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "disk" / "b.json").read_text() == "{}"


def test_no_device_is_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no plain file"):
        write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_pipeline_is_not_written_where_nothing_can_be(pipe, tmp_path, monkeypatch, run):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = run("convert", "no/such/model", "--out", tmp_path / "X")
    assert code == 2 and f"you have no right to write in {tmp_path}" in err


def test_what_an_unfinished_save_left_does_not_make_a_folder_used(tmp_path, run):
    (tmp_path / "X").mkdir()
    (tmp_path / "X" / folders.unfinished_name()).mkdir()
    code, _, err = run("convert", "mini-teacher", "--out", tmp_path / "X")
    assert (code, err) == (0, "")
    assert pipelines.FILES in {path.name for path in (tmp_path / "X" / "convfusion").iterdir()}
