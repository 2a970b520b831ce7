"""What the steps share: the pictures, their captions, and states that survive a kill."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Pictures:
    """One side of the split: images uint8 [P, 3, 64, 64] and a row of facts per picture."""

    images: torch.Tensor
    rows: list[dict]


def load_pictures(run: Path, side: str) -> Pictures:
    """The `train` or the `held_out` side of the split that `emoji.py` wrote."""
    facts = json.loads((run / "names.json").read_text())
    held = set(facts["held_out"])
    keep = [(row["name"] in held) == (side == "held_out") for row in facts["pictures"]]
    images = np.load(run / "emoji.npz")["images"][np.array(keep)]
    rows = [row for row, k in zip(facts["pictures"], keep, strict=True) if k]
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), rows)


def caption(row: dict, *, design: bool = True) -> str:
    """`waving hand sign, dark skin tone, noto`."""
    parts = [row["name"], row["tone"], row["design"] if design else ""]
    return ", ".join(part for part in parts if part)


def save_state(path: Path, parts: dict, step: int) -> None:
    """Write aside, then rename: a kill leaves the previous state whole."""
    aside = path.with_suffix(".tmp")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, aside)
    os.replace(aside, path)


def load_state(path: Path, parts: dict) -> int:
    """Restore `parts` in place and return the step to go on from (0 without a state)."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]
