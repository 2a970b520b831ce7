"""The batch of each step, with its noise and timesteps: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convfusion.data.latents import TrainingData
from convfusion.distill.config import DistillConfig
from convfusion.errors import ConvFusionError


class BatchPart(NamedTuple):
    """A part of a batch; the conditioning is named as by `flatten_conditioning`."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor | None]


class BatchIndices:
    """The indices of each step's batch, by step.

    Every batch comes from one group. In an epoch each sample is drawn once, but that the last batch
    of a group is filled up with samples of that group again. Going on at a step needs no replay.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.groups = [group for group in groups if len(group)]
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = sum(-(-len(group) // batch_size) for group in self.groups)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        batches = []
        for group in self.groups:
            order = torch.randperm(len(group), generator=generator).tolist()
            for start in range(0, len(order), self.batch_size):
                places = range(start, start + self.batch_size)
                batches.append([group[order[place % len(order)]] for place in places])
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[place] for place in shuffled]


class StepBatches(Dataset):
    """By step, the parts of one process's share of the batch.

    Noise, timesteps and dropped captions are drawn for the whole batch, so that the share of a
    process is what one process alone would have at these places.

    Args:
        data: what to draw from, by its groups.
        config: batch size, parts, caption dropout and seed.
        count: timesteps of the noise schedule.
        process: this process and how many there are.
    """

    def __init__(
        self,
        data: TrainingData,
        config: DistillConfig,
        count: int,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        rank, processes = process
        pieces = processes * config.accumulation
        if config.batch_size % pieces:
            raise ConvFusionError(
                f"batch_size {config.batch_size} is not a multiple of {processes} processes × "
                f"{config.accumulation} parts"
            )
        self.data, self.config, self.count = data, config, count
        self.batches = BatchIndices(data.groups, config.batch_size, config.seed)
        size = config.batch_size // pieces
        first = rank * config.accumulation
        self.parts = [
            slice(piece * size, (piece + 1) * size)
            for piece in range(first, first + config.accumulation)
        ]

    def __getitem__(self, step: int) -> list[BatchPart]:
        config, indices = self.config, self.batches[step]
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**63)
        seeds = torch.randint(0, 2**62, (len(indices),), generator=generator).tolist()
        timesteps = torch.randint(0, self.count, (len(indices),), generator=generator)
        chance = torch.rand(len(indices), generator=generator)
        dropped = (chance < config.caption_drop).tolist()
        parts = []
        for part in self.parts:
            latents, conditioning = self.data.take(indices[part], dropped[part])
            noise = torch.stack([noise_like(latents[0], seed) for seed in seeds[part]])
            parts.append(BatchPart(latents, noise, timesteps[part], conditioning))
        return parts


def noise_like(latents: Tensor, seed: int) -> Tensor:
    """Gaussian noise in a shape, from a seed of its own."""
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
