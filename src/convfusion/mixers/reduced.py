"""Full attention between fewer tokens: pooled keys and values, merged tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import ProjectedMixer, TokenMixer, check_grid
from convfusion.mixers.merging import match
from convfusion.mixers.tokens import Grid
from convfusion.settings import check_fields


@dataclass(frozen=True)
class Pooled:
    """The site's own attention, to keys and values of a pooled grid.

        out = W_o·softmax(W_q·x·(W_k·x̄)ᵀ/√d)·W_v·x̄ + b_o,   x̄ = means over factor × factor tokens

    Windows over the border average what they hold. The projections are linear, so pooling the
    tokens is pooling keys and values. Queries stay as many: the cost is that of the attention over
    factor², still quadratic in N.
    Source: the spatial-reduction attention of Wang et al., "Pyramid Vision Transformer", ICCV 2021,
    arXiv 2102.12122, with the average pooling of "PVT v2", arXiv 2106.13797.

    Attributes:
        factor: side of a pooling window, in tokens.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.factor < 1:
            raise ConvFusionError(f"factor must be at least 1, not {self.factor}")

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return PooledMixer(channels, heads, self)


@dataclass(frozen=True)
class ToMe:
    """The site's own attention between merged tokens: token merging for diffusion models.

        x' = merge(x),   out = unmerge(attention(x'))

    Of every stride × stride tokens the first is a destination, the others are sources. Each source
    has the destination that is most like it (cosine of the tokens); the `ratio`·N sources that are
    most like theirs are averaged into it, and receive its output. The cost is quadratic in N.
    Source: Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", CVPR 2023 workshops, arXiv
    2303.17604. There the destinations may be drawn at random at each step and the matching sees the
    tokens before the norm; here they are fixed, and it sees what the mixer sees, normalised tokens.

    Attributes:
        ratio: of the N tokens, how many are merged away.
        stride: side of a region with one destination, in tokens.
    """

    ratio: float = 0.5
    stride: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stride < 2:
            raise ConvFusionError(f"stride must be at least 2, not {self.stride}")
        most = 1 - 1 / self.stride**2
        if not 0 <= self.ratio <= most:
            raise ConvFusionError(
                f"ratio must lie between 0 and 1 − 1/stride² = {most:g}, not {self.ratio}"
            )

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return ToMeMixer(channels, heads, self)


class PooledMixer(ProjectedMixer):
    """softmax(q·k̄ᵀ/√d)·v̄ over the keys and values of the pooled grid."""

    config: Pooled

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, check_grid(tokens, grid))
        factor = self.config.factor
        pooled = F.avg_pool2d(maps, factor, ceil_mode=True, count_include_pad=False)
        few = pooled.flatten(2).transpose(1, 2)
        query = self.split(self.to_q(tokens))
        key, value = self.split(self.to_k(few)), self.split(self.to_v(few))
        return self.join(F.scaled_dot_product_attention(query, key, value))


class ToMeMixer(ProjectedMixer):
    """The attention of merged tokens, handed back to those that were merged."""

    config: ToMe

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        matching = match(tokens, grid, self.config.ratio, self.config.stride)
        query, key, value = self.project(matching.merge(tokens))
        return matching.unmerge(self.join(F.scaled_dot_product_attention(query, key, value)))
