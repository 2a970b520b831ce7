"""What the operation means: the pyramid of a ΔConvBlock on tokens, in plain PyTorch.

For tokens y [B, N, C'] that lie row by row on a grid H×W (N = H·W):

    p_0 = y,   p_i = 2×2 means of p_{i-1}, in ceil mode: border windows average what they hold
    z_i = upsample(gate(depthwise_K(p_i)))       bilinear, align_corners=False, back to H×W
    out = [z_0, …, z_{n-1}] along the channels   [B, N, n·C'/2]

This file is written to be read and compared with; nothing in it is tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid(
    tokens: Tensor,
    weights: Sequence[Tensor],
    grid: tuple[int, int],
    gate: str,
    pooling: str = "ceil",
) -> Tensor:
    """All stages of tokens [B, N, C'], side by side: [B, N, n·C'/2], same dtype.

    Args:
        tokens: of a grid (H, W), row by row.
        weights: of each of the n stages, depthwise kernels [C', 1, K, K], K odd.
        grid: (H, W) with H·W = N.
        gate: `scaled`, `reference` or `sigmoid`; see `meet`.
        pooling: `ceil`, or `adaptive` to ⌊H/2^i⌋×⌊W/2^i⌋ at once.
    """
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    stages, pooled = [], maps
    for i, weight in enumerate(weights):
        if i and pooling == "adaptive":
            sides = max(1, grid[0] // 2**i), max(1, grid[1] // 2**i)
            pooled = F.adaptive_avg_pool2d(maps, sides)
        elif i:
            pooled = F.avg_pool2d(pooled, 2, ceil_mode=True, count_include_pad=False)
        summed = F.conv2d(pooled, weight, padding=weight.shape[-1] // 2, groups=len(weight))
        mixed = meet(summed, gate)
        stages.append(F.interpolate(mixed, grid, mode="bilinear", align_corners=False))
    return torch.cat(stages, 1).flatten(2).transpose(1, 2)


def meet(maps: Tensor, gate: str) -> Tensor:
    """The gate: halves f1, f2 of the channels of maps [B, C', H, W] → [B, C'/2, H, W].

    `scaled`: f1·f2/√C'; `reference`: f1·f2·√(C'/2); `sigmoid`: f1·σ(f2).
    """
    first, second = maps.chunk(2, dim=1)
    if gate == "sigmoid":
        return first * second.sigmoid()
    return first * (second * factor(maps.shape[1], gate))


def factor(channels: int, gate: str) -> float:
    """What `scaled` and `reference` multiply f1·f2 with, for C' channels of both halves."""
    return channels**-0.5 if gate == "scaled" else (channels / 2) ** 0.5


def pooled_sides(grid: tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """The grid of each stage under `ceil`: (⌈H/2^i⌉, ⌈W/2^i⌉)."""
    return [(-(-grid[0] // 2**i), -(-grid[1] // 2**i)) for i in range(stages)]
