"""What a run tells while it goes on: a file of losses, the trackers, validation pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.files import is_whole, unreadable, write_picture, write_text

HISTORY = "losses.jsonl"
HELD_OUT = "held_out/epsilon_error"


def tracker_name(wanted: str) -> str | None:
    """The tracker that `DistillConfig.tracker` asks for, or None.

    Raises:
        ConvFusionError: it is not installed, or accelerate does not know it.
    """
    here = [name.value for name in get_available_trackers()]
    if wanted == "none" or (wanted == "auto" and "tensorboard" not in here):
        return None
    name = "tensorboard" if wanted == "auto" else wanted
    if name not in here:
        known = ", ".join(["auto", "none", *here])
        hint = "; pip install 'convfusion[train]'" if name == "tensorboard" else ""
        raise ConvFusionError(f"the tracker {wanted!r} is not installed: there are {known}{hint}")
    return name


def read_history(out: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; a line that a kill tore or damaged is left out.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = out / HISTORY
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise unreadable(path, error) from None
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and all(map(_is_number, entry.values())) and "step" in entry:
            entries.append(entry)
    return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class RunLog:
    """Writes the losses of a run to `losses.jsonl` and to its tracker; only one process does.

    Args:
        accelerator: with the tracker.
        out: the run's folder; without one nothing is written.
        step: steps done before; what a run that is resumed logged after them is forgotten.
        config: told to the tracker.
    """

    def __init__(
        self, accelerator: Accelerator, out: Path | None, step: int, config: dict[str, Any]
    ) -> None:
        self.accelerator = accelerator
        self.out = out if accelerator.is_main_process else None
        if out is not None:
            plain = {k: v for k, v in config.items() if isinstance(v, int | float | str)}
            accelerator.init_trackers("convfusion", config=plain)
        if self.out is not None:
            kept = [entry for entry in read_history(self.out) if entry["step"] <= step]
            self.out.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            write_text(self.out / HISTORY, text)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log named numbers of a step, except for those that are not finite.

        Raises:
            CheckpointError: the line cannot be written, as on a full disk.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.accelerator.log(values, step=step)
        if self.out is None:
            return
        path = self.out / HISTORY
        try:
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None

    def picture(self, step: int, picture: Any) -> None:
        """Write a validation picture, and show it where the tracker can."""
        if self.out is None:
            return
        path = picture_of(self.out, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, picture)
        pixels = np.asarray(picture.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            show(tracker, pixels, step)

    def close(self) -> None:
        """Let the trackers finish. The processes go on: a script may have more to do."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def picture_of(out: Path, step: int) -> Path:
    """Where the validation picture of a step lies."""
    return out / "validation" / f"step-{step:07d}.png"


class Owed(NamedTuple):
    """What is missing of a validation: its picture, and its ε-error in the log."""

    picture: bool
    error: bool


def owed(out: Path, step: int, *, held_out: bool) -> Owed:
    """What a kill left undone of the validation of a step, which may have samples held out."""
    told = any(HELD_OUT in entry for entry in read_history(out) if entry["step"] == step)
    return Owed(not is_whole(picture_of(out, step)), held_out and not told)


def show(tracker: GeneralTracker, pixels: np.ndarray, step: int) -> None:
    """Show pictures [B, H, W, 3] in a tracker that takes them."""
    if tracker.name == "tensorboard":
        tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"validation": list(pixels)}, step=step)
