"""A run that is cut off ends with all that it should have: pictures, errors and a whole log."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_resume import converted, samples
from tiny_pipelines import block_weights

from convfusion import CheckpointError, ConvFusionError
from convfusion.distill import DistillConfig, distill
from convfusion.distill.logs import HISTORY, picture_of, read_history
from convfusion.distill.trainer import Trainer

HERE = Path(__file__).parent
CONFIG = DistillConfig(
    steps=4, batch_size=2, save_every=1, validate_every=2, held_out=2, ema=0.5, tracker="none"
)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def draw(pipe, step):
    """A picture that tells the weights it was drawn with."""
    total = sum(tensor.double().sum().item() for tensor in block_weights(pipe).values())
    return Image.new("RGB", (8, 8), (int(1e6 * total) % 256, step, 0))


def contents(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    result = distill(converted(), samples(), CONFIG, out, validate=draw)
    return contents(out), result


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("moment", ["drawing", "writing", "measuring", "logging"])
def test_a_validation_that_was_killed_is_done_again(straight, tmp_path, monkeypatch, moment, step):
    def killed(*args, **options):
        raise Killed

    def drawing(pipe, at):
        if at != step:
            return draw(pipe, at)
        if moment == "drawing":
            raise Killed
        if moment == "writing":  # what a kill leaves of a file that is not written aside
            path = picture_of(tmp_path, step)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"\x89PNG")
            raise Killed
        if moment == "measuring":
            monkeypatch.setattr(Trainer, "held_out_error", killed)
        if moment == "logging":
            monkeypatch.setattr("convfusion.distill.logs.json.dumps", killed)
        return draw(pipe, at)

    with monkeypatch.context(), pytest.raises(Killed):
        distill(converted(), samples(), CONFIG, tmp_path, validate=drawing)
    monkeypatch.undo()
    result = distill(converted(), samples(), CONFIG, tmp_path, resume=True, validate=draw)
    assert contents(tmp_path) == straight[0]
    assert result.epsilon_error == straight[1].epsilon_error


def test_a_run_that_lacks_nothing_validates_nothing_again(tmp_path):
    distill(converted(), samples(), CONFIG, tmp_path, validate=draw)
    before = contents(tmp_path)
    drawn = []
    distill(
        converted(), samples(), CONFIG, tmp_path, resume=True,
        validate=lambda pipe, step: drawn.append(step),
    )  # fmt: skip
    assert drawn == [] and contents(tmp_path) == before


def test_a_run_that_draws_no_pictures_lacks_none(tmp_path):
    distill(converted(), samples(), CONFIG, tmp_path)
    before = contents(tmp_path)
    distill(converted(), samples(), CONFIG, tmp_path, resume=True)
    assert contents(tmp_path) == before


DAMAGE = [
    b'{"step": 3, "loss',
    b"3",
    b'{"loss/noise": 1}',
    b'{"step": "x"}',
    b"\xff\xfe",
    b"[" * 9999,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_of_the_log_costs_no_other_one(straight, tmp_path, damage):
    distill(converted(), samples(), CONFIG, tmp_path, validate=draw)
    path = tmp_path / HISTORY
    lines = path.read_bytes()
    path.write_bytes(lines + damage)
    assert len(read_history(tmp_path)) == len(lines.splitlines())
    distill(converted(), samples(), CONFIG, tmp_path, resume=True, validate=draw)
    assert contents(tmp_path) == straight[0]


def test_a_log_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / HISTORY).mkdir()
    with pytest.raises(CheckpointError, match=r"losses\.jsonl cannot be read"):
        read_history(tmp_path)


@pytest.mark.parametrize("name", [
    "trainer.json", "optimizer.safetensors", "average.safetensors", "blocks.safetensors",
    "convfusion.json",
])  # fmt: skip
@pytest.mark.parametrize("left", [0, 20])
def test_a_checkpoint_that_is_cut_off_is_named(tmp_path, name, left):
    config = DistillConfig(steps=1, batch_size=2, ema=0.5, tracker="none")
    distill(converted(), samples(), config, tmp_path)
    path = tmp_path / "checkpoints" / "step-0000001" / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=name) as told:
        distill(converted(), samples(), config, tmp_path, resume=True)
    assert "\n" not in str(told.value)


def test_an_error_that_is_not_finite_is_no_number_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "held_out_error", lambda self: float("nan"))
    result = distill(converted(), samples(), CONFIG, tmp_path)
    assert result.epsilon_error != result.epsilon_error
    assert all("held_out/epsilon_error" not in entry for entry in read_history(tmp_path))


HOLDER = f"""
import sys, time
sys.path[:0] = [{str(HERE)!r}]
from test_resume_validation import CONFIG, converted, samples
from convfusion.distill import distill
def wait(step, terms):
    print(step, flush=True)
    time.sleep(60)
distill(converted(), samples(), CONFIG, sys.argv[1], resume=True, on_step=wait)
"""


def test_one_process_trains_into_a_folder(tmp_path):
    """The second one is refused, and once the first one was killed it goes on."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "1\n"
    try:
        for resume in (True, False):
            with pytest.raises(ConvFusionError, match="is being written into by process"):
                distill(converted(), samples(), CONFIG, tmp_path, resume=resume)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert distill(converted(), samples(), CONFIG, tmp_path, resume=True).steps == 4
    steps = [e["step"] for e in read_history(tmp_path) if "loss/distill" in e]
    assert steps == sorted(set(steps))
