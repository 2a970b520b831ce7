"""What is measured while a run goes on: the ε-error on samples held out, and where it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from convfusion.clips import generate_clips
from convfusion.data.clips import draw_strip
from convfusion.data.latents import TrainingData
from convfusion.distill.batches import noise_like
from convfusion.distill.task import DistillTask, collected
from convfusion.evaluate import TIMESTEPS, epsilon_errors
from convfusion.families import denoiser_of, native_frames
from convfusion.families.conditioning import place_conditioning
from convfusion.generate import generate, swapped_denoiser
from convfusion.mixers import Grid
from convfusion.report import draw_grid
from convfusion.surgery import attention_teacher, mixers_of


class Noised(NamedTuple):
    """A batch of clean latents, noises by timestep, and conditioning as `TrainingData` gives it."""

    latents: Tensor
    noises: dict[int, Tensor]
    conditioning: dict[str, Tensor | None]


@torch.no_grad()
def held_out_error(
    task: DistillTask,
    data: TrainingData,
    *,
    batch_size: int,
    seed: int = 0,
) -> float | None:
    """Mean ‖ε̂ − ε̃‖²/‖ε̃‖² over samples and timesteps; None without samples.

    Args:
        task: student and teacher.
        data: the samples.
        batch_size: samples at once.
        seed: of the noises; each sample has its own at every timestep.
    """
    errors = []
    for clean, noises, conditioning in noised(data, batch_size, seed):
        told = place_conditioning(conditioning, task.student)
        batch_errors = epsilon_errors(
            task.student, task.teacher, task.schedule, clean, noises, told
        )
        errors.append(batch_errors.flatten())
    return torch.cat(errors).mean().item() if errors else None


def noised(data: TrainingData, batch_size: int, seed: int) -> Iterator[Noised]:
    """All samples in batches, with the noise of each at every one of `TIMESTEPS`.

    The noise depends on seed, sample and timestep alone. Arguments as for `held_out_error`.
    """
    for group in data.groups:
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            clean, conditioning = data.take(part, [False] * len(part))
            noises = {
                t: torch.stack([noise_like(clean[0], _mixed(seed, t, i)) for i in part])
                for t in TIMESTEPS
            }
            yield Noised(clean, noises, conditioning)


def _mixed(*numbers: int) -> int:
    """A seed that depends on each number: PyTorch's CPU generator drops all but its low 32 bits."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**32
    return seed


@torch.no_grad()
def what_fails(
    task: DistillTask,
    parts: Sequence[tuple[Tensor, Tensor, Tensor, dict[str, Any]]],
    *,
    alone: bool = False,
) -> str | None:
    """The first thing on a student's way that is not finite, in words; None if there is none here.

    Gradients are looked at too, so it must be called before they are clipped or cleared. Errors
    run backwards through them, so that of the last site on the way comes first.

    Args:
        task: student and teacher.
        parts: the arguments of `task` for each part of the batch.
        alone: look at each block alone, as stage 1 trains it.
    """
    mixers = mixers_of(task.student)
    order = list(mixers)
    for part in parts:
        with collected(mixers, "input") as inputs, collected(mixers, "output") as outputs:
            task(*part, alone=alone)
        order = list(outputs)
        for path in order:
            if not inputs[path].isfinite().all():
                return f"what comes to {path}: the data, or the frozen model"
            if not outputs[path].isfinite().all():
                return f"the output of the block at {path}"
    for path in reversed(order):
        gradients = [p.grad for p in mixers[path].parameters() if p.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            return f"the gradient of the block at {path}"
    return None


@torch.no_grad()
def draw_validation(
    pipe: Any, prompts: list[str], guidance: float, size: Grid | None = None
) -> Image.Image:
    """A grid of the prompts as student and teacher draw them from equal seeds.

    Args:
        pipe: converted, with its attention kept.
        prompts: a column for each; of a video model, a row of some frames for each.
        guidance: classifier-free guidance scale.
        size: (frames, height, width) of clips, by default the pipeline's own. Pictures are drawn
            at the pipeline's own size.
    """
    if native_frames(pipe):
        return _draw_strips(pipe, prompts, guidance, size)
    rows = {"student": generate(pipe, prompts, guidance=guidance, progress=False)}
    with swapped_denoiser(pipe, attention_teacher(denoiser_of(pipe))):
        rows["teacher"] = generate(pipe, prompts, guidance=guidance, progress=False)
    return draw_grid(rows, prompts)


def _draw_strips(pipe: Any, prompts: list[str], guidance: float, size: Grid | None) -> Image.Image:
    options: dict[str, Any] = {"guidance": guidance, "progress": False}
    if size is not None:
        options |= {"frames": size[0], "size": size[1:]}
    clips = {"student": generate_clips(pipe, prompts, **options)}
    with swapped_denoiser(pipe, attention_teacher(denoiser_of(pipe))):
        clips["teacher"] = generate_clips(pipe, prompts, **options)
    rows = {name: [draw_strip(clip) for clip in drawn] for name, drawn in clips.items()}
    return draw_grid(rows, prompts, columns=1)
