"""What a distillation draws its batches from: latents, each with its caption's conditioning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.families import encode_conditioning, latent_scale
from convfusion.families.conditioning import flatten_conditioning

# Of the squared norm: equal pictures may round otherwise in another batch of the autoencoder.
EQUAL = 1e-6


class TrainingData(Protocol):
    """Latents and conditioning that are ready for the denoiser."""

    @property
    def captions(self) -> Sequence[str]:
        """Of every sample."""
        ...

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Indices of the samples, those with equally large latents together."""
        ...

    def take(
        self, indices: Sequence[int], dropped: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Samples of one group.

        Args:
            indices: of the samples.
            dropped: for each, whether to take the empty caption in place of its own.

        Returns:
            Clean, scaled latents [B, C, h, w], or [B, C, t, h, w] of videos, in float32, and the
            denoiser's further arguments as `flatten_conditioning` names them, each [B, …] or None;
            all on the CPU.
        """
        ...


@dataclass(frozen=True)
class LatentDataset:
    """Latents in memory, each with its caption.

    Attributes:
        latents: [P, C, h, w], or [P, C, t, h, w] of videos, scaled as the denoiser expects them.
        captions: P captions.
    """

    latents: Tensor
    captions: list[str]

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.captions) or not self.captions:
            raise ConvFusionError(
                f"there are {len(self.latents)} latents and {len(self.captions)} captions; "
                "as many of each are needed, and at least one"
            )
        if not self.latents.isfinite().all():
            raise ConvFusionError("some latents are not finite: was the VAE run in float16?")

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Subset:
    """Some samples of a data set, as `TrainingData`; the others are never taken."""

    whole: TrainingData
    groups: Sequence[Sequence[int]]

    @property
    def captions(self) -> Sequence[str]:
        return [self.whole.captions[i] for group in self.groups for i in group]

    def take(
        self, indices: Sequence[int], dropped: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        return self.whole.take(indices, dropped)


class EncodedLatents:
    """A `LatentDataset` with the conditioning of its captions, each encoded once.

    Args:
        pipe: whose text encoder is asked.
        data: latents and captions.
        batch_size: captions encoded at once.
    """

    def __init__(self, pipe: Any, data: LatentDataset, batch_size: int = 64) -> None:
        self.captions: Sequence[str] = data.captions
        self.groups: Sequence[Sequence[int]] = [range(len(data))]
        self._latents = data.latents
        names = list(dict.fromkeys(["", *data.captions]))
        places = {name: place for place, name in enumerate(names)}
        self._places = [places[caption] for caption in data.captions]
        scale = latent_scale(pipe)
        size = (data.latents.shape[-2] * scale, data.latents.shape[-1] * scale)
        parts = [
            flatten_conditioning(encode_conditioning(pipe, names[start : start + batch_size], size))
            for start in range(0, len(names), batch_size)
        ]
        self._conditioning = {key: join_parts([part[key] for part in parts]) for key in parts[0]}

    def take(
        self, indices: Sequence[int], dropped: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        rows = [0 if drop else self._places[i] for i, drop in zip(indices, dropped, strict=True)]
        conditioning = {
            key: None if table is None else table[rows] for key, table in self._conditioning.items()
        }
        return self._latents[list(indices)].float(), conditioning


def join_parts(parts: list[Tensor | None]) -> Tensor | None:
    """Parts of a batch, one after the other on the CPU."""
    tensors = [part.cpu() for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def prepare_data(pipe: Any, data: TrainingData | LatentDataset) -> TrainingData:
    """Data that is ready for the denoiser: captions of latents in memory are encoded."""
    return EncodedLatents(pipe, data) if isinstance(data, LatentDataset) else data


def hold_out(data: TrainingData, count: int, seed: int) -> tuple[Subset, Subset]:
    """A data set in two, by seed: what to train on, and `count` samples kept out of it.

    Samples whose picture is that of one held out are in neither part, whatever their caption.
    All latents are read once for that, if any are held out.

    Raises:
        ConvFusionError: nothing would be left to train on.
    """
    total = sum(len(group) for group in data.groups)
    if count >= total:
        raise ConvFusionError(f"{count} samples cannot be held out: there are {total} in all")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    every = [index for group in data.groups for index in group]
    apart = {every[place] for place in order[:count]}
    kept, held = [], []
    for group in data.groups:
        held_group = [index for index in group if index in apart]
        rest = [index for index in group if index not in apart]
        held.append(held_group)
        kept.append(drop_equal_latents(data, rest, held_group))
    if not any(kept):
        raise ConvFusionError(
            f"{count} samples cannot be held out: all others have the same pictures"
        )
    return Subset(data, [g for g in kept if g]), Subset(data, [g for g in held if g])


def drop_equal_latents(
    data: TrainingData, indices: Sequence[int], others: Sequence[int]
) -> list[int]:
    """Those samples of a group whose latents are not equal to any of others, up to rounding."""
    if not others:
        return list(indices)
    targets = torch.cat([part for _, part in _read_flat_latents(data, others)])
    norms = targets.square().sum(1)
    different = []
    for part, latents in _read_flat_latents(data, indices):
        distances = (
            latents.square().sum(1, keepdim=True) + norms - 2 * (latents @ targets.T)
        )  # squared, [b, others]
        equal = (distances <= EQUAL * norms).any(1).tolist()
        different += [index for index, same in zip(part, equal, strict=True) if not same]
    return different


def _read_flat_latents(
    data: TrainingData, indices: Sequence[int], batch_size: int = 64
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Samples of a group in batches: their indices, and their latents as rows in float64."""
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield part, data.take(part, [True] * len(part))[0].flatten(1).double()
