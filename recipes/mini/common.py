"""What the steps share: the pictures, their captions, and training that survives a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Pictures:
    """One side of the split: images uint8 [P, 3, size, size] and a row of facts per picture."""

    images: torch.Tensor
    rows: list[dict]


def load_pictures(run: Path, side: str, size: int = 64) -> Pictures:
    """The `train` or the `held_out` side of the split that `emoji.py` wrote.

    Names may share a picture: what equals one of `train`, pixel by pixel, is not held out.

    Args:
        run: folder of the pictures.
        side: of the split.
        size: in pixels: 64, or the 128 of `emoji_large.py`, which lacks some.
    """
    facts = json.loads((run / "names.json").read_text())
    held = set(facts["held_out"])
    kept = np.load(run / ("emoji.npz" if size == 64 else f"emoji-{size}.npz"))
    images = kept["images"]
    pictures = [facts["pictures"][i] for i in kept["rows"]] if "rows" in kept else facts["pictures"]
    apart = np.array([row["name"] in held for row in pictures])
    seen = {image.tobytes() for image in images[~apart]}
    wanted = apart if side == "held_out" else ~apart
    keep = [
        own and (side == "train" or image.tobytes() not in seen)
        for own, image in zip(wanted, images, strict=True)
    ]
    rows = [row for row, k in zip(pictures, keep, strict=True) if k]
    return Pictures(torch.from_numpy(images[keep]).permute(0, 3, 1, 2).contiguous(), rows)


def caption(row: dict, *, design: bool = True) -> str:
    """`waving hand sign, dark skin tone, noto`."""
    parts = [row["name"], row["tone"], row["design"] if design else ""]
    return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of a training: linear up at the start, linear to 0 at the end."""

    steps: int
    decay_steps: int
    lr: float
    warmup: int
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        return self.lr * min(1, (step + 1) / self.warmup, (self.steps - step) / self.decay_steps)


def fit(
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    schedule: Schedule,
    kept: Path,
    *,
    average: AveragedModel | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a model by AdamW in bfloat16 autocast, on from the state `kept` if there is one.

    Args:
        model: on its device.
        loss_of: the loss of a step, by the step, the weights and torch's own generator, which is
            seeded by the step, so that a run that goes on is as one that never stopped.
        schedule: of steps and learning rate.
        kept: file that the state is written to every 250 steps and at the end.
        average: of the weights, updated with each step.
        on_step: called with the number of steps done.
    """
    optimizer = make_optimizer(model, schedule.weight_decay)
    state = {"model": model, "optimizer": optimizer} | ({"average": average} if average else {})
    first = step = load_state(kept, state)
    started = time.time()
    while step < schedule.steps:
        loss = take_step(model, optimizer, loss_of, step, schedule.rate(step), average)
        step += 1
        if step % 50 == 0:
            rate = (step - first) / (time.time() - started)
            print(f"{step} loss {loss.item():.4f} {rate:.2f} steps/s", flush=True)
        on_step(step)  # before the state that says it was
        if step % 250 == 0 or step == schedule.steps:
            save_state(kept, state, step)


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """The optimiser of all trainings."""
    return torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )


def take_step(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    loss_of: Callable[[int], torch.Tensor],
    step: int,
    rate: float,
    average: AveragedModel | None,
) -> torch.Tensor:
    """Take one step in bfloat16 autocast at a learning rate, and return its loss."""
    torch.manual_seed(2**31 + step)  # none of the seeds that batches are drawn from
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        loss = loss_of(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if average is not None:
        average.update_parameters(model)
    return loss.detach()


def weighted(prediction: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over a batch of ‖ε̂ − ε‖²/n, each with its weight [B]."""
    return (weight * (prediction.float() - noise).square().mean(dim=(1, 2, 3))).mean()


@torch.no_grad()
def ema_step(old: list[torch.Tensor], new: list[torch.Tensor], count: torch.Tensor) -> None:
    """A moving average that forgets the start fast and then keeps 0.9995 a step."""
    torch._foreach_lerp_(old, new, 1 - min(0.9995, (1 + int(count)) / (10 + int(count))))


def read_ahead(batch_of: Callable[[int], Any], steps: int) -> Callable[[int], Any]:
    """The batches of steps that follow one another; where there is a GPU, made while it works.

    Args:
        batch_of: makes the batch of a step, of tensors of the CPU.
        steps: how many there are.
    """
    workers = min(8, len(os.sched_getaffinity(0)) - 1) if torch.cuda.is_available() else 0
    batches: list[Iterator[Any]] = []

    def get(step: int) -> Any:
        if not batches:
            loader = DataLoader(
                range(step, steps),
                batch_size=None,
                collate_fn=batch_of,
                num_workers=workers,
                generator=torch.Generator(),  # not torch's own, which a step is seeded by
            )
            batches.append(iter(loader))
        return next(batches[0])

    return get


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


def forget_folder(kept: Path) -> None:
    """Drop the name of the folder that a pipeline was read from, which diffusers saves with it."""
    for file in (kept / "model_index.json", *kept.glob("*/config.json")):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
