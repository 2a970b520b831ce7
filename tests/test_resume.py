"""A run that is cut off anywhere goes on, and ends in the same bits as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import block_weights, stable_diffusion

import convfusion
from convfusion import CheckpointError, DeltaConv, checkpoint, files, uniform
from convfusion.data import LatentDataset
from convfusion.distill import DistillConfig, LossWeights, distill
from convfusion.distill.state import last_checkpoint, optimizer_tensors, restore_optimizer
from convfusion.surgery import mixers_of

pytestmark = pytest.mark.libraries

HERE = Path(__file__).parent
CONFIG = DistillConfig(
    steps=12,
    imitation_steps=3,
    start="attention",
    batch_size=4,
    accumulation=2,
    ema=0.9,
    held_out=2,
    save_every=2,
    log_every=1,
    learning_rate=1e-2,
    warmup=2,
    decay=0.5,
    losses=LossWeights(noise=1.0),
)


def converted():
    torch.manual_seed(0)
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    return pipe


def samples():
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentDataset(latents, ["red", "green", "apple", "", "red", "green", "apple", "red"])


CHILD = f"""
import os, sys, torch
sys.path[:0] = [{str(HERE)!r}]
torch.set_num_threads(1)
from test_resume import CONFIG, converted, samples
from convfusion.distill import distill
def told(step, terms):
    print(step, flush=True)
distill(converted(), samples(), CONFIG, sys.argv[1], resume=True, on_step=told)
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The blocks of a run that nothing disturbed, by a process like those that are killed."""
    out = tmp_path_factory.mktemp("straight")
    subprocess.run([sys.executable, "-c", CHILD, out], check=True, capture_output=True)
    return out


def test_a_killed_run_ends_in_the_same_bits(straight, tmp_path):
    """Killed in the first stage, and again in the second, between two checkpoints."""
    for wanted in (3, 9):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE, text=True
        )
        for line in child.stdout:
            if int(line) == wanted:
                child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / checkpoint.MANIFEST).exists()
    subprocess.run([sys.executable, "-c", CHILD, tmp_path], check=True, capture_output=True)
    names = ["blocks.safetensors", "convfusion.json", "losses.jsonl"]
    last = Path("checkpoints", f"step-{CONFIG.steps:07d}")
    names += [last / name for name in ("blocks.safetensors", "optimizer.safetensors")]
    names += [last / name for name in ("average.safetensors", "trainer.json")]
    for name in names:
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name


def test_what_is_saved_in_the_end_is_the_average(straight):
    averages = files.read_tensors(last_checkpoint(straight) / "average.safetensors")
    raw = files.read_tensors(last_checkpoint(straight) / "blocks.safetensors")
    saved = files.read_tensors(straight / "blocks.safetensors")
    for key, tensor in saved.items():
        assert torch.equal(tensor, averages[key.replace(".mixer.", ".")])
    assert any(not torch.equal(tensor, raw[key]) for key, tensor in saved.items())


def test_losses_are_logged_by_term_and_site(straight):
    lines = [json.loads(line) for line in (straight / "losses.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "gradient_norm" in line]
    assert [line["step"] for line in steps] == list(range(1, CONFIG.steps + 1))
    sites = {f"site/{path}" for path in mixers_of(converted())}
    for line in steps:
        terms = {"imitation"} if line["step"] <= 3 else {"distill", "noise", "feature"}
        assert {key for key in line if key.startswith("loss/")} == {f"loss/{t}" for t in terms}
        assert {key for key in line if key.startswith("site/")} == sites


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.mark.parametrize("writes", range(1, 7))
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, writes):
    config = DistillConfig(steps=4, batch_size=2, save_every=1, ema=0.9)
    flush, count = os.fsync, 0
    expected = converted()
    distill(expected, samples(), config)

    def fail_later(handle):
        nonlocal count
        count += 1
        if count == 7 + writes:  # a checkpoint flushes five files and two folders
            raise Killed
        flush(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail_later)
        with pytest.raises(Killed):
            distill(converted(), samples(), config, tmp_path)
    assert last_checkpoint(tmp_path).name == "step-0000001"
    resumed = converted()
    assert distill(resumed, samples(), config, tmp_path, resume=True).steps == 4
    assert not list((tmp_path / "checkpoints").glob(".convfusion-*"))
    for name, tensor in block_weights(expected).items():
        assert torch.equal(block_weights(resumed)[name], tensor)


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files, set after the first checkpoint, stands for the full disk."""
    code = f"""
import resource, sys, torch
sys.path[:0] = [{str(HERE)!r}]
from test_resume import converted, samples
from convfusion import ConvFusionError
from convfusion.distill import DistillConfig, distill
def told(step, terms):
    if step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
config = DistillConfig(steps=4, batch_size=2, save_every=1, tracker="none")
try:
    distill(converted(), samples(), config, sys.argv[1], on_step=told)
except ConvFusionError as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True
    ).stdout
    assert "the checkpoint of step 2 cannot be written" in said
    assert "step-0000001 is intact" in said
    assert len(said.strip().splitlines()) == 1
    config = DistillConfig(steps=4, batch_size=2, save_every=1)
    assert distill(converted(), samples(), config, tmp_path, resume=True).steps == 4


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    config = DistillConfig(steps=3, batch_size=2, save_every=1)

    def refuse(path, text):
        raise OSError("no space left")

    def told(step, terms):
        if step == 3:
            monkeypatch.setattr(files, "write_text", refuse)

    with pytest.raises(CheckpointError, match="step 3 cannot be written: no space left"):
        distill(converted(), samples(), config, tmp_path, on_step=told)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000001", "step-0000002"]


def test_a_run_that_has_ended_resumes_to_the_same_end(tmp_path):
    config = DistillConfig(steps=2, batch_size=2, ema=0.5)
    distill(converted(), samples(), config, tmp_path)
    again = converted()
    result = distill(again, samples(), config, tmp_path, resume=True)
    assert result.steps == 2
    saved = files.read_tensors(tmp_path / "blocks.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, block_weights(again)[name.replace(".mixer.", ".")])


def test_what_a_run_cannot_go_on_from_is_refused(tmp_path):
    config = DistillConfig(steps=3, batch_size=2)
    distill(converted(), samples(), config, tmp_path)
    with pytest.raises(CheckpointError, match="has done 3 steps, not 2"):
        distill(converted(), samples(), replace(config, steps=2), tmp_path, resume=True)
    other = converted()
    other.unet.conv_in.weight.data += 1
    with pytest.raises(CheckpointError, match="another base model"):
        distill(other, samples(), config, tmp_path, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="blocks but no checkpoint"):
        distill(converted(), samples(), config, tmp_path, resume=True)


def test_optimisers_that_share_tensors_are_saved():
    """As bitsandbytes does with its quantisation maps."""
    shared = torch.arange(4.0)
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in "ab"}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        optimizer.state[parameter] = {"step": 3, "state1": torch.ones(2), "qmap1": shared}
    tensors = optimizer_tensors(optimizer, parameters)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    fresh = torch.optim.AdamW(parameters.values())
    restore_optimizer(fresh, parameters, tensors)
    assert fresh.state[parameters["b"]]["step"] == 3
    assert torch.equal(fresh.state[parameters["b"]]["qmap1"], shared)
