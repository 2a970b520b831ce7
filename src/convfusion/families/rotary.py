"""Rotary embeddings: what turns the queries and keys of a self-attention by where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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

    @classmethod
    def of(cls, values: Iterable[Any]) -> PairTurn:
        """From the arguments of an attention, one of which is (cos, sin).

        Raises:
            ConvFusionError: none of them is.
        """
        for value in values:
            if isinstance(value, tuple | list) and len(value) >= 2:  # behind them a grid may travel
                cosine, sine = (each.reshape(-1, each.shape[-1]) for each in value[:2])
                return cls(cosine, sine)
        raise ConvFusionError(
            "a self-attention was called without the rotary embedding that its family has"
        )

    def __call__(self, heads: Tensor) -> Tensor:
        """Queries or keys [B, h, N, d] as they are compared."""
        both: Any = tuple(each.to(heads.device, heads.dtype) for each in (self.cosine, self.sine))
        turned: Any = apply_rotary_emb(heads, both)
        return turned

    def equals(self, other: Any) -> bool:
        """Whether another one turns every token alike."""
        return torch.equal(self.cosine, other.cosine) and torch.equal(self.sine, other.sine)
