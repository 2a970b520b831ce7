"""Checkpoints of a run: the blocks, the optimiser's moments, the step and the config.

Each is a folder `checkpoints/step-NNNNNNN`, written aside and renamed; the last two are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convfusion import checkpoint
from convfusion.adapters import Denoiser
from convfusion.errors import CheckpointError, ConvFusionError

OPTIMIZER, STATE = "optimizer.safetensors", "trainer.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
FREE = ("steps", "save_every", "validate_every")  # may change when a run goes on


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint of a run holds, read and checked, but for its blocks."""

    folder: Path
    step: int
    moments: dict[str, Tensor]


def check_unused(out: Path) -> None:
    """Raise a ConvFusionError if a folder holds blocks or another run's checkpoints."""
    if any((out / "checkpoints").glob("step-*")) or (out / checkpoint.MANIFEST).exists():
        raise ConvFusionError(
            f"{out} holds blocks or the checkpoints of a run: resume it, or choose another folder"
        )


def write_run(
    out: Path,
    student: Denoiser,
    named: Mapping[str, nn.Parameter],
    optimizer_state: Mapping[Any, Mapping[str, Tensor]],
    step: int,
    config: dict[str, Any],
) -> None:
    """Write a checkpoint aside, rename it, then forget all but the last two."""
    root = out / "checkpoints"
    aside, final = root / "writing", root / f"step-{step:07d}"
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.save(student, aside)
    moments = {
        f"{name}/{moment}": optimizer_state[parameter][moment].contiguous()
        for name, parameter in named.items()
        for moment in MOMENTS
    }
    checkpoint.write_tensors(aside / OPTIMIZER, moments)
    state = {"step": step, "config": config}
    checkpoint.write_text(aside / STATE, json.dumps(state, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in sorted(root.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def read_run(
    out: Path, named: Mapping[str, nn.Parameter], config: dict[str, Any]
) -> SavedRun | None:
    """The last checkpoint of a run, or None if it has none.

    Args:
        out: the run's folder.
        named: the parameters being trained, by name.
        config: the run's config as it is now.

    Raises:
        CheckpointError: a file is damaged, or was written with another config.
    """
    found = sorted((out / "checkpoints").glob("step-*"))
    if not found:
        return None
    folder = found[-1]
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step, before = int(state["step"]), dict(state["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from None
    here = json.loads(json.dumps(config))
    changed = sorted(k for k in here if here[k] != before.get(k) and k not in FREE)
    if changed:
        raise CheckpointError(
            f"{folder} was written with another {', '.join(changed)}: resume with the same "
            "config, or start in another folder"
        )
    moments = checkpoint.read_tensors(folder / OPTIMIZER)
    expected = {f"{name}/{moment}" for name in named for moment in MOMENTS}
    if moments.keys() != expected:
        raise CheckpointError(f"{folder / OPTIMIZER} does not hold the moments of these blocks")
    for name, parameter in named.items():
        if any(moments[f"{name}/{m}"].shape != parameter.shape for m in MOMENTS[1:]):
            raise CheckpointError(f"{folder / OPTIMIZER}: the moments of {name} have another shape")
    return SavedRun(folder, step, moments)
