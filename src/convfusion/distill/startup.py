"""What a distillation starts its blocks from: calls of the denoiser on its own training data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from convfusion.data.latents import LatentDataset, TrainingData, prepare_data
from convfusion.distill.batches import BatchIndices
from convfusion.families import Denoiser, arrange_call, denoiser_of
from convfusion.families.conditioning import place_conditioning
from convfusion.families.watch import can_watch
from convfusion.schedule import noise_schedule
from convfusion.surgery import mixers_of
from convfusion.surgery.record import record_of

PICTURES, BATCH = 32, 8  # that the attention is measured on


def draw_noised_batches(
    pipe: Any,
    data: LatentDataset | TrainingData,
    pictures: int = PICTURES,
    batch_size: int = BATCH,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Calls of a denoiser on noised latents at random timesteps, as keyword arguments.

    Args:
        pipe: a pipeline.
        data: whose latents and captions are used.
        pictures: how many of them.
        batch_size: at once.
        seed: of pictures, noises and timesteps.
    """
    denoiser, ready = denoiser_of(pipe), prepare_data(pipe, data)
    batches = BatchIndices(ready.groups, min(batch_size, pictures), seed)
    generator = torch.Generator().manual_seed(seed)
    schedule = noise_schedule(pipe.scheduler, denoiser)
    for number in range(-(-pictures // batch_size)):
        part = batches[number]
        clean, conditioning = ready.take(part, [False] * len(part))
        noise = torch.randn(clean.shape, generator=generator)
        steps = torch.randint(0, len(schedule), (len(part),), generator=generator)
        noisy = schedule.add_noise(clean, noise, steps)
        yield arrange_call(
            denoiser,
            noisy.to(denoiser.device, denoiser.dtype),
            schedule.tell(steps).to(denoiser.device),
            place_conditioning(conditioning, denoiser),
        )


def blocks_to_start(student: Denoiser) -> set[str]:
    """The paths of the mixers that neither training nor a start has changed since `convert`.

    There is none where a rotary embedding of a kind that is not known turns queries and keys: such
    blocks begin as `convert` left them.
    """
    if not can_watch(student):
        return set()
    return {p for p, mixer in mixers_of(student).items() if not record_of(mixer).is_started}
