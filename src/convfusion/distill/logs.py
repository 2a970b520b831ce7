"""What a run tells while it goes on: a file of losses, the trackers, validation pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from convfusion.errors import ConvFusionError
from convfusion.files import write_text

HISTORY = "losses.jsonl"


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
    """The logged steps of a run, in order; a line torn by a kill is left out."""
    path = out / HISTORY
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


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
        """Log named numbers of a step, but for those that are not finite."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.accelerator.log(values, step=step)
        if self.out is not None:
            with open(self.out / HISTORY, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, step: int, picture: Any) -> None:
        """Write a validation picture, and show it where the tracker can."""
        if self.out is None:
            return
        folder = self.out / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step-{step:07d}.png")
        pixels = np.asarray(picture.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            show(tracker, pixels, step)

    def close(self) -> None:
        """Let the trackers finish. The processes go on: a script may have more to do."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def show(tracker: GeneralTracker, pixels: np.ndarray, step: int) -> None:
    """Show pictures [B, H, W, 3] in a tracker that takes them."""
    if tracker.name == "tensorboard":
        tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"validation": list(pixels)}, step=step)
