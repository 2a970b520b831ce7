"""The contract of token mixers, and what those share that keep the attention's projections.

Settings are a frozen dataclass with `build(channels, heads)` for a site of so many channels and
attention heads, which returns a `TokenMixer`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError

Grid = tuple[int, ...]  # (H, W), or (T, H, W) of a video


class TokenMixer(nn.Module):
    """What stands in place of a self-attention: the contract of `convfusion.mixers`.

    Attributes:
        config: the settings that it was built from.
        ranks: of the grids that it works on: 2 for (H, W), 3 for (T, H, W).
    """

    config: Any
    ranks: ClassVar[tuple[int, ...]] = (2,)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Mix tokens [B, N, C] that lie row by row on a grid; same shape and dtype out."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def init_from(self, attention: Any) -> None:
        """Start from the diffusers `Attention` that is replaced; by default, do nothing."""


class Mixer(Protocol):
    """Settings of a token mixer."""

    def build(self, channels: int, heads: int) -> TokenMixer: ...


class ProjectedMixer(TokenMixer):
    """A mixer with projections `to_q`, `to_k`, `to_v`, `to_out` of its own, split into heads.

    Args:
        channels: C of the tokens.
        heads: h; each head works on d = C/h channels.
        config: the settings that it is built from.

    Raises:
        ConvFusionError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, heads: int, config: Any) -> None:
        super().__init__()
        if channels % heads:
            raise ConvFusionError(f"{heads} heads do not divide {channels} channels")
        self.config, self.heads = config, heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def split(self, tokens: Tensor) -> Tensor:
        """[B, N, C] → [B, h, N, d]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, h, N, d] of tokens [B, N, C]."""
        return (
            self.split(self.to_q(tokens)),
            self.split(self.to_k(tokens)),
            self.split(self.to_v(tokens)),
        )

    def join(self, mixed: Tensor) -> Tensor:
        """The heads [B, h, N, d] side by side, through the output projection: [B, N, C]."""
        return self.to_out(mixed.transpose(1, 2).flatten(2))

    def init_from(self, attention: Any) -> None:
        """Take over the projections of a diffusers `Attention`; a missing bias is zero."""
        if attention.heads != self.heads:
            raise ConvFusionError("the attention's heads are not the site's")
        for mine, stock in (
            (self.to_q, attention.to_q),
            (self.to_k, attention.to_k),
            (self.to_v, attention.to_v),
            (self.to_out, attention.to_out[0]),
        ):
            take_over(mine, stock)


@torch.no_grad()
def take_over(mine: nn.Linear, stock: nn.Linear) -> None:
    """Copy a layer of the same shape; a missing bias is zero."""
    if mine.weight.shape != stock.weight.shape:
        raise ConvFusionError("the attention's inner channels are not the site's")
    mine.weight.copy_(stock.weight)
    mine.bias.zero_()
    if stock.bias is not None:
        mine.bias.copy_(stock.bias)


def check_grid(tokens: Tensor, grid: Grid) -> Grid:
    """Return the grid if as many tokens [B, N, C] are there as it has places.

    Raises:
        ConvFusionError: N is another number; both are named.
    """
    places = 1
    for side in grid:
        places *= side
    if tokens.shape[1] != places:
        shape = "×".join(str(side) for side in grid)
        raise ConvFusionError(
            f"there are N = {tokens.shape[1]} tokens, but the grid {shape} has {places}"
        )
    return grid
