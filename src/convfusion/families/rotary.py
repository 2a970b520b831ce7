"""Rotary embeddings: what turns the queries and keys of a self-attention by where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from convfusion.errors import ConvFusionError


@dataclass(frozen=True, eq=False)
class PairTurn:
    """Turns channels 2i and 2i + 1 of each head by one angle, as most models do.

    Attributes:
        cosine, sine: of the angle of each token and channel, [N, d].
    """

    cosine: Tensor
    sine: Tensor
    axis: ClassVar[int] = -1  # of the two channels that are turned together, in [d/2, 2]

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """From the arguments of an attention, one of which is (cos, sin).

        Raises:
            ConvFusionError: none of them is.
        """
        cosine, sine = find_angles(values)
        return cls(cosine.reshape(-1, cosine.shape[-1]), sine.reshape(-1, sine.shape[-1]))

    def __call__(self, heads: Tensor) -> Tensor:
        """Queries or keys [B, h, N, d] as they are compared."""
        both: Any = tuple(each.to(heads.device, heads.dtype) for each in (self.cosine, self.sine))
        turned: Any = apply_rotary_emb(heads, both, use_real_unbind_dim=self.axis)
        return turned

    def equals(self, other: Any) -> bool:
        """Whether another one turns every token alike."""
        return torch.equal(self.cosine, other.cosine) and torch.equal(self.sine, other.sine)


class HalvesTurn(PairTurn):
    """Turns channels i and i + d/2 of each head by one angle."""

    axis = -2  # in [2, d/2]


def find_angles(values: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """(cos, sin) among the arguments of an attention.

    Raises:
        ConvFusionError: none of them is.
    """
    for value in values:
        if isinstance(value, tuple | list) and len(value) >= 2:  # behind them a grid may travel
            return value[0], value[1]
    raise without_rotary()


def without_rotary() -> ConvFusionError:
    """What is said of a self-attention that was called without the embedding it should have."""
    return ConvFusionError(
        "a self-attention was called without the rotary embedding that its family has"
    )


def take_first(each: Tensor) -> Tensor:
    """What all samples of a batch have in common, from their embeddings [B, …].

    Raises:
        ConvFusionError: they differ.
    """
    if not torch.equal(each[1:], each[:-1]):
        raise ConvFusionError(
            "the rotary embedding differs between the samples of one batch: for analysis and "
            "measured starts, call the model with samples of one size and frame rate"
        )
    return each[0]
