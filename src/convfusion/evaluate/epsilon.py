"""How far the noise that a student sees is from what its teacher sees.

The ε of a flow is its velocity: these errors are then ‖v̂ − ṽ‖²/‖ṽ‖².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convfusion.families import (
    Denoiser,
    call_denoiser,
    denoiser_of,
    encode_conditioning,
    latent_scale,
)
from convfusion.schedule import Schedule, noise_schedule

TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)  # where ε-errors are measured


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖ε̂ − ε̃‖² / ‖ε̃‖² of each sample of [B, …]; [B] float64."""
    taught = teacher.double()
    difference = (student.double() - taught).square().flatten(1).sum(dim=1)
    return difference / taught.square().flatten(1).sum(dim=1)


def epsilon_error(
    pipe: Any,
    teacher: Denoiser,
    latents: Tensor,
    prompts: list[str],
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 123_456,
    batch_size: int = 64,
) -> float:
    """Mean of ‖ε̂ − ε̃‖²/‖ε̃‖² over latents and timesteps, each pair with noise of its own.

    Args:
        pipe: the student's pipeline.
        teacher: the denoiser to compare with.
        latents: clean and scaled, [P, C, h, w] or [P, C, t, h, w].
        prompts: P prompts.
        timesteps: all are tried for every latent.
        seed: of the noises.
        batch_size: latents per forward pass.
    """
    student = denoiser_of(pipe)
    schedule = noise_schedule(pipe.scheduler, student)
    scale = latent_scale(pipe)
    size = (latents.shape[-2] * scale, latents.shape[-1] * scale)
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(latents.shape, generator=generator) for _ in timesteps]
    errors = []
    for start in range(0, len(latents), batch_size):
        part = slice(start, start + batch_size)
        conditioning = encode_conditioning(pipe, prompts[part], size)
        chosen = {t: noise[part] for t, noise in zip(timesteps, noises, strict=True)}
        part_errors = epsilon_errors(
            student, teacher, schedule, latents[part], chosen, conditioning
        )
        errors.append(part_errors.flatten())
    return torch.cat(errors).mean().item()


@torch.no_grad()
def epsilon_errors(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    latents: Tensor,
    noises: Mapping[int, Tensor],
    conditioning: dict[str, Any],
) -> Tensor:
    """‖ε̂ − ε̃‖²/‖ε̃‖² of a batch at several timesteps.

    Args:
        student: what is judged.
        teacher: what it is compared with.
        schedule: as `noise_schedule` gives it.
        latents: clean and scaled, [B, C, h, w] or [B, C, t, h, w].
        noises: by timestep, as the latents.
        conditioning: further keyword arguments of both denoisers, on their device.

    Returns:
        [T, B] float64.
    """
    learned, taught = (
        predictions(model, schedule, latents, noises, conditioning) for model in (student, teacher)
    )
    return torch.stack([relative_error(*pair) for pair in zip(learned, taught, strict=True)])


@torch.no_grad()
def predictions(
    model: Denoiser,
    schedule: Schedule,
    latents: Tensor,
    noises: Mapping[int, Tensor],
    conditioning: dict[str, Any],
) -> list[Tensor]:
    """The noise or velocity that a denoiser sees in a batch, at each step: as the latents each.

    Arguments as for `epsilon_errors`.
    """
    clean = latents.to(model.device, torch.float32)
    outputs = []
    for t, noise in noises.items():
        steps = torch.full((len(clean),), t, device=clean.device)
        noisy = schedule.add_noise(clean, noise.to(clean.device), steps).to(model.dtype)
        told = schedule.tell(steps)
        output = call_denoiser(model, noisy, told, conditioning)
        outputs.append(schedule.read_output(output, noisy, steps))
    return outputs
