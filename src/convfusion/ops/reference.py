"""What the pyramid of a ΔConvBlock computes, in plain PyTorch: its one definition.

For maps y [B, C', H, W]:

    p_0 = y,   p_i = 2×2 means of p_{i-1}, in ceil mode: border windows average what they hold
    z_i = upsample(gate(depthwise_K(p_i)))       bilinear, align_corners=False, back to H×W
    out = [z_0, …, z_{n-1}] along the channels   [B, n·C'/2, H, W]

The block calls `pyramid` with its own modules; `pyramid_of_tokens` is the same for tokens and
kernels, and the fused operation is compared with it. Nothing in this file is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid(
    maps: Tensor,
    convolutions: Iterable[Callable[[Tensor], Tensor]],
    gate: Callable[[Tensor], Tensor],
    pooling: str = "ceil",
) -> Tensor:
    """All stages of maps [B, C', H, W], concatenated: [B, n·C'/2, H, W].

    Args:
        maps: of any H and W.
        convolutions: of each of the n stages; maps [B, C', h, w] → [B, C', h, w].
        gate: of every stage; maps [B, C', h, w] → [B, C'/2, h, w], as `apply_gate`.
        pooling: `ceil`, or `adaptive` to ⌊H/2^i⌋×⌊W/2^i⌋ at once.
    """
    size = maps.shape[-2:]
    stages, pooled = [], maps
    for i, convolve in enumerate(convolutions):
        if i:
            pooled = halve(pooled) if pooling == "ceil" else shrink(maps, 2**i)
        gated = gate(convolve(pooled))
        if i:
            gated = F.interpolate(gated, size=size, mode="bilinear", align_corners=False)
        stages.append(gated)
    return torch.cat(stages, dim=1)


def pyramid_of_tokens(
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
        gate: `scaled`, `reference` or `sigmoid`; see `apply_gate`.
        pooling: `ceil` or `adaptive`.
    """
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    convolutions = [partial(convolve_depthwise, weight=weight) for weight in weights]
    stages = pyramid(maps, convolutions, partial(apply_gate, gate=gate), pooling)
    return stages.flatten(2).transpose(1, 2)


def convolve_depthwise(maps: Tensor, weight: Tensor) -> Tensor:
    """Maps [B, C', H, W] with a kernel [C', 1, K, K] for each channel, zeros beyond the border."""
    return F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=len(weight))


def halve(maps: Tensor) -> Tensor:
    """2×2 means of maps [B, C, H, W]: [B, C, ⌈H/2⌉, ⌈W/2⌉], border windows over what they hold."""
    return F.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False)


def shrink(maps: Tensor, factor: int) -> Tensor:
    """Adaptive means of maps [B, C, H, W]: [B, C, ⌊H/factor⌋, ⌊W/factor⌋], each at least 1."""
    height, width = maps.shape[-2:]
    return F.adaptive_avg_pool2d(maps, (max(1, height // factor), max(1, width // factor)))


def apply_gate(maps: Tensor, gate: str) -> Tensor:
    """Gate the first half f1 of the channels by the second, f2: [B, C', H, W] → [B, C'/2, H, W].

    `scaled`: f1·f2/√C'; `reference`: f1·f2·√(C'/2); `sigmoid`: f1·σ(f2). f2 is scaled before the
    product, so that `scaled` stays within float16 where the product itself would not.
    """
    first, second = maps.chunk(2, dim=1)
    if gate == "sigmoid":
        return first * second.sigmoid()
    return first * (second * gate_scale(maps.shape[1], gate))


def gate_scale(channels: int, gate: str) -> float:
    """What `scaled` and `reference` multiply f1·f2 with, for C' channels of both halves."""
    return channels**-0.5 if gate == "scaled" else (channels / 2) ** 0.5


def pooled_sides(grid: tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """The grid of each stage under `ceil`: (⌈H/2^i⌉, ⌈W/2^i⌉)."""
    return [(-(-grid[0] // 2**i), -(-grid[1] // 2**i)) for i in range(stages)]
