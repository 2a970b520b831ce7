"""Checkpoints of a run: the blocks, the optimiser's state, their average, the step, the config.

Each is a folder `checkpoints/step-NNNNNNN`. It is written aside, flushed to disk and renamed, and
older ones are forgotten only then; so whatever ends a run, a whole checkpoint is left.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convfusion import checkpoint, files
from convfusion.data.latents import LatentDataset, TrainingData
from convfusion.data.samples import digest_names
from convfusion.data.store import LatentCache
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.families import Denoiser, denoiser_of
from convfusion.fingerprint import (
    differences,
    digest_of_json,
    fingerprint,
    identity,
    module_settings,
    scheduler_identity,
    tensor_fingerprint,
)
from convfusion.folders import remove_remains, scratch_folder

# Of an optimiser's tensors, those of their parameter's shape; '' is the average's.
SHAPED = ("", "exp_avg", "exp_avg_sq", "momentum_buffer")
OPTIMIZER, AVERAGE, STATE = "optimizer.safetensors", "average.safetensors", "trainer.json"
KEPT = 2
# What may change when a run goes on.
FREE = ("steps", "save_every", "validate_every", "log_every", "workers", "tracker", "max_skipped")


@dataclass
class RunState:
    """What a checkpoint holds beside the blocks.

    Attributes:
        step: steps done.
        skipped: of them, those skipped because something was not finite.
        optimizer: the optimiser's tensors, `<parameter>/<name>`.
        average: the moving average of each parameter and, as `updates`, how often it was updated;
            empty without one.
        scaler: state of the fp16 loss scaler; empty without one.
    """

    step: int = 0
    skipped: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def check_unused(out: Path) -> None:
    """Raise a ConvFusionError if a folder holds blocks or another run's checkpoints."""
    if checkpoints(out) or (out / checkpoint.MANIFEST).exists():
        raise ConvFusionError(
            f"{out} holds blocks or the checkpoints of a run: resume it, or choose another folder"
        )


def step_of(folder: Path) -> int:
    """The step that a checkpoint is of, by its name; -1 for another folder."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() and number != folder.name else -1


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = (out / "checkpoints").glob("step-*")
    return sorted((each for each in folders if step_of(each) >= 0), key=step_of)


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of a run, if it has one."""
    return next(reversed(checkpoints(out)), None)


def to_resume(out: Path) -> Path | None:
    """The checkpoint to go on from, or None for a run that has not come to one.

    Raises:
        CheckpointError: the run's blocks are there, but its checkpoints are gone.
    """
    last = last_checkpoint(out)
    if last is None and (out / checkpoint.MANIFEST).exists():
        raise CheckpointError(
            f"{out} has blocks but no checkpoint to resume from: load the blocks into the base, "
            "and distil into another folder"
        )
    return last


def write_run(
    out: Path,
    student: Denoiser,
    state: RunState,
    config: dict[str, Any],
    rests_on: dict[str, Any],
) -> None:
    """Write a checkpoint and forget all but the last two.

    Args:
        out: the run's folder.
        student: whose blocks are trained.
        state: everything else.
        config: of the run.
        rests_on: what its numbers rest on beside that, as `rests_on` gives it.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; the others are intact.
    """
    root = out / "checkpoints"
    final = root / f"step-{state.step:07d}"
    facts = {
        "step": state.step,
        "skipped": state.skipped,
        "scaler": state.scaler,
        "optimizer": sorted(state.optimizer),
        "average": sorted(state.average),
        "rests_on": rests_on,
        "config": config,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_remains(root)
        with scratch_folder(root) as aside:
            checkpoint.save(student, aside)
            files.write_tensors(aside / OPTIMIZER, state.optimizer)
            if state.average:
                files.write_tensors(aside / AVERAGE, state.average)
            files.write_text(aside / STATE, json.dumps(facts, indent=2) + "\n")
            flush_folder(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        flush_folder(root)
    except (OSError, CheckpointError) as error:
        last = last_checkpoint(out)
        left = f"{last} is intact" if last else "there is none before it"
        raise CheckpointError(
            f"the checkpoint of step {state.step} cannot be written: {error}; {left}"
        ) from None
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # the new one is whole: nothing is lost


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_run(
    folder: Path,
    named: Mapping[str, nn.Parameter],
    config: dict[str, Any],
    rests_on: dict[str, Any],
) -> RunState:
    """A checkpoint of a run, checked, but for its blocks.

    Args:
        folder: of the checkpoint.
        named: the parameters being trained, by name.
        config: the run's config as it is now.
        rests_on: what the run rests on now.

    Raises:
        CheckpointError: a file is damaged, or was written with another config, base model, noise
            schedule or data, or the run has done more steps than it shall.
    """
    facts = check_same_run(folder, config)
    try:
        state = RunState(int(facts["step"]), int(facts["skipped"]), scaler=dict(facts["scaler"]))
        expected, before = (facts["optimizer"], facts["average"]), dict(facts["rests_on"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from None
    if other := differences(before, rests_on):
        raise CheckpointError(
            f"{folder} is of a run with another {', another '.join(other)}: resume with what it "
            "was begun with, or start in another folder"
        )
    if state.step > config["steps"]:
        raise CheckpointError(f"{folder} has done {state.step} steps, not {config['steps']}")
    state.optimizer = _read(folder / OPTIMIZER, expected[0], named)
    if expected[1]:
        state.average = _read(folder / AVERAGE, expected[1], named)
    return state


def check_same_run(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself; a CheckpointError if it is of another config."""
    try:
        facts = files.read_json(folder / STATE)
        before = dict(facts["config"])
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} has no config: {error}") from None
    here = json.loads(json.dumps(config))
    changed = sorted(k for k in here if here[k] != before.get(k) and k not in FREE)
    if changed:
        raise CheckpointError(
            f"{folder} was written with another {', '.join(changed)}: resume with the same "
            "config, or start in another folder"
        )
    return facts


def _read(path: Path, expected: list[str], named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tensors of a file: those that are expected, of parameters that are trained here."""
    tensors = files.read_tensors(path)
    known = {name for name in tensors if name.partition("/")[0] in (*named, "updates")}
    if sorted(tensors) != expected or known != tensors.keys():
        raise CheckpointError(f"{path} does not hold the state of these blocks")
    for key, tensor in tensors.items():
        name, _, kind = key.partition("/")
        if name in named and kind in SHAPED and tensor.shape != named[name].shape:
            raise CheckpointError(f"{path}: {key} has another shape than its parameter")
    return tensors


def rests_on(pipe: Any, data: TrainingData | LatentDataset) -> dict[str, Any]:
    """What the numbers of a run rest on beside its config, for JSON; None for what is not known."""
    student = denoiser_of(pipe)
    base = {"weights": fingerprint(student, without=".mixer."), **module_settings(student)}
    told: dict[str, Any] = {"captions": digest_names(data.captions), "samples": len(data.captions)}
    if isinstance(data, LatentDataset):
        told["latents"] = tensor_fingerprint(data.latents)
    elif isinstance(data, LatentCache):
        kept = ("rests_on", "drawn_by", "size", "buckets", "half", "source")
        told["cache"] = digest_of_json([data.manifest.get(name) for name in kept])
    parts = {"base model": base, "scheduler": scheduler_identity(pipe.scheduler), "data": told}
    return parts | identity(pipe)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The state of an optimiser by parameter, numbers as tensors; empty before its first step.

    Copies on the CPU: a GPU may have no room for a second state, and bitsandbytes shares tensors
    among parameters, which safetensors would refuse.
    """
    return {
        f"{name}/{key}": torch.as_tensor(value).to("cpu", copy=True).contiguous()
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Give an optimiser the state that `optimizer_tensors` took."""
    for key, tensor in tensors.items():
        name, _, kind = key.partition("/")
        parameter = named[name]
        # Steps are counted on the CPU, by AdamW in a tensor and by bitsandbytes in a number.
        counted = tensor if tensor.is_floating_point() else int(tensor)
        value = counted if kind == "step" else tensor.to(parameter.device)
        optimizer.state[parameter][kind] = value
