"""Mixers that compare no tokens: nothing, the mean token, one depthwise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import TokenMixer, check_grid, projections, take_over
from convfusion.mixers.delta_conv import set_to_uniform_attention
from convfusion.mixers.joint import JointMixer, SharedMixer, attend_to_text, split_rows
from convfusion.mixers.offsets import QUERIES, choose_queries
from convfusion.mixers.sampling import attend_at
from convfusion.mixers.tokens import Grid, JointTokens, TokenSample
from convfusion.settings import check_fields


@dataclass(frozen=True)
class Removed:
    """No mixing at all: the site adds nothing."""

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return RemovedMixer(self)

    def build_joint(self, channels: int, heads: int) -> JointMixer:
        """Tokens of the image attend to the text alone."""
        return JointRemovedMixer(self)


@dataclass(frozen=True)
class MeanOnly:
    """Uniform attention: every token receives the same projection of the mean token."""

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return MeanOnlyMixer(channels, self)

    def build_joint(self, channels: int, heads: int) -> JointMixer:
        return SharedMixer(channels, heads, self, "predicted", self)


@dataclass(frozen=True)
class Depthwise:
    """One depthwise convolution between the attention's value and output projections.

        out = W_o·depthwise_K(W_v·x + b_v) + b_o

    Zero-padded by K//2, without a bias of its own. It starts as the mean over K×K tokens: away
    from the border, attention that is uniform within that window.

    Attributes:
        kernel_size: odd side K, in tokens.
    """

    kernel_size: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConvFusionError(f"kernel_size must be odd and positive, not {self.kernel_size}")

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return DepthwiseMixer(channels, self)

    def build_joint(self, channels: int, heads: int) -> JointMixer:
        return SharedMixer(channels, heads, self, "predicted", self)


class RemovedMixer(TokenMixer):
    """Zeros in the shape of the tokens."""

    ranks = (2, 3)

    def __init__(self, config: Removed) -> None:
        super().__init__()
        self.config = config

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        return torch.zeros_like(tokens)


class JointRemovedMixer(JointMixer):
    """What tokens of the image gather from the text; 0 without one."""

    ranks = (2, 3)

    def __init__(self, config: Removed) -> None:
        super().__init__()
        self.config = config

    def forward(self, tokens: JointTokens, grid: Grid) -> Tensor:  # type: ignore[override]
        parts = [attend_to_text(q, tokens)[0] for (q,) in split_rows(tokens, tokens.image.query)]
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


class MeanOnlyMixer(TokenMixer):
    """proj(mean over tokens), at every token."""

    ranks = (2, 3)
    has_measured_start = True

    def __init__(self, channels: int, config: MeanOnly) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        return self.proj(tokens.mean(dim=1, keepdim=True)).expand_as(tokens)

    def init_from(self, attention: Any) -> None:
        """Exactly uniform attention: W_o·W_v and W_o·b_v + b_o."""
        set_to_uniform_attention(self.proj, attention)

    @torch.no_grad()
    def start_from(self, attention: Any, sample: Sequence[TokenSample]) -> None:
        """Uniform attention, whose bias is such that the mean output is the attention's."""
        self.init_from(attention)
        missed = []
        for each in sample:
            chosen = choose_queries(each.tokens.shape[1], QUERIES)
            given = attend_at(attention, each, chosen)
            mean = each.tokens.to(given).mean(dim=1)
            missed.append((given.mean(dim=1) - F.linear(mean, self.proj.weight.float())).mean(0))
        self.proj.bias.copy_(torch.stack(missed).mean(0))


class DepthwiseMixer(TokenMixer):
    """to_out(depthwise(to_v(tokens)))."""

    def __init__(self, channels: int, config: Depthwise) -> None:
        super().__init__()
        self.config = config
        side = config.kernel_size
        self.to_v = nn.Linear(channels, channels)
        self.conv = nn.Conv2d(
            channels, channels, side, padding=side // 2, groups=channels, bias=False
        )
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        maps = self.to_v(tokens).transpose(1, 2).unflatten(2, check_grid(tokens, grid))
        return self.to_out(self.conv(maps).flatten(2).transpose(1, 2))

    @torch.no_grad()
    def init_from(self, attention: Any) -> None:
        """Take over its value and output projections; the kernel is a mean."""
        _, _, value, out = projections(attention)
        take_over(self.to_v, value)
        take_over(self.to_out, out)
        self.conv.weight.fill_(1 / self.config.kernel_size**2)
