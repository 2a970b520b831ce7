"""The halo block of joint attention: text, a window and pooled tokens in one softmax.

For the query q of a token of the image, with everything as in `mixers.halo` except that queries,
keys and values are the attention's own, all d channels of a head:

    s_ij = q_i·k_j/√d + ρ_h(j − i)             for j in the window of i's block
    s_ic = q_i·k̄_c/√d + log n_ic + λ_h         for a cell c with n_ic tokens outside of that window
    s_it = q_i·k_t/√d                          for each token t of the text
    y_i  = softmax(s_i)·(v ; v̄ ; v_t)

The softmax is worked out in two parts, by the sum of each; see `mixers.joint`. With a window over
the whole grid, and ρ = 0 as at the start, it is the attention. What is learned are ρ and λ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers.halo import Halo, HaloMixer
from convfusion.mixers.joint import JointMixer, blend, split_rows
from convfusion.mixers.tokens import Grid, JointTokens


class JointHaloMixer(HaloMixer, JointMixer):
    """Window, pooled tokens and text in one softmax; see the module's equations.

    Attributes:
        relative: ρ, [h, 2w − 1 along each axis].
        far: λ, [h].

    Raises:
        ConvFusionError: the heads do not divide the channels, or the settings ask for fewer
            channels than a head has.
    """

    has_measured_start = False
    starts_near = True  # with the attention's own queries, keys and values
    large_chunk = 2**13  # whose scores are kept beside those of the text
    may_fuse = False

    def __init__(self, channels: int, heads: int, config: Halo) -> None:
        nn.Module.__init__(self)
        if channels % heads:
            raise ConvFusionError(f"{heads} heads do not divide {channels} channels")
        if (config.key_ratio, config.value_ratio) != (1, 1):
            raise ConvFusionError(
                "where text and image share an attention, its projections stay, so that fewer "
                "channels would save nothing: give Halo(…, key_ratio=1, value_ratio=1)"
            )
        self.config, self.heads = config, heads
        self.ranks = (config.rank,)
        self.sides = tuple(config.sides(name) for name in ("block", "window", "cells"))
        self.key_rank = self.value_rank = channels // heads
        reach = [2 * window - 1 for window in config.sides("window")]
        self.relative = nn.Parameter(torch.zeros(heads, *reach))
        self.far = nn.Parameter(torch.zeros(heads))

    def forward(self, tokens: JointTokens, grid: Grid) -> Tensor:  # type: ignore[override]
        """Rows of the image [B, N, h·d]; see `JointMixer`."""
        image = tokens.image
        scaled = image.query * image.query.shape[-1] ** -0.5
        packed = torch.cat([scaled, image.key, image.value], dim=3).transpose(1, 2).flatten(2)
        rows = self.gather(packed, grid).unflatten(2, (self.heads, -1)).transpose(1, 2)
        own, high, low = rows.split((self.value_rank, 1, 1), dim=3)
        if tokens.text.key.shape[2]:
            total = high.float() + low
            parts = [
                blend(near, sums, query, tokens)
                for near, sums, query in split_rows(tokens, own, total, image.query)
            ]
            own = torch.cat(parts, dim=2)
        return own.transpose(1, 2).flatten(2)

    def read_queries(self, tokens: Tensor) -> Tensor:
        """Of tokens that hold query, key and value of each head."""
        return tokens.unflatten(2, (self.heads, -1))[..., : self.key_rank].flatten(2)

    def read_keys(self, tokens: Tensor) -> Tensor:
        """Of the same, keys and values."""
        return tokens.unflatten(2, (self.heads, -1))[..., self.key_rank :].flatten(2)

    def finish_rows(self, mixed: Tensor, scores: Tensor) -> Tensor:
        """The rows and, behind them, the logarithm of the sum of their softmax.

        It is in two parts, which together are exact where the dtype is short.
        """
        total = scores.float().logsumexp(-1, keepdim=True)
        high = total.to(mixed.dtype)
        return torch.cat([mixed, high, (total - high.float()).to(mixed.dtype)], dim=-1)

    def init_from(self, attention: Any) -> None:
        """Nothing to take over: it computes with what the attention projects."""

    start_from = JointMixer.start_from
