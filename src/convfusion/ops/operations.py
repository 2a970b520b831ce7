"""Operations of the fused operation, which PyTorch's counter could not look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convfusion.ops import reference

Shape = Sequence[int]


def convolution_flops(tokens: Shape, weights: Shape, grid: tuple[int, int]) -> int:
    """Operations of the depthwise convolutions, two per multiply-add; gates are not counted.

    Args:
        tokens: their shape (B, N, C').
        weights: their shape (n, K·K, C').
        grid: (H, W).
    """
    stages, taps, channels = weights
    pixels = sum(height * width for height, width in reference.pooled_sides(grid, stages))
    return 2 * tokens[0] * pixels * taps * channels


def forward_flops(
    tokens: Shape, weights: Shape, height: int, width: int, *_: Any, **__: Any
) -> int:
    """Of `convfusion::pyramid`, in the form that PyTorch's counter asks for."""
    return convolution_flops(tokens, weights, (height, width))


def backward_flops(
    grad: Shape,
    tokens: Shape,
    weights: Shape,
    height: int,
    width: int,
    gate: str,
    weight_grad: bool,
    **_: Any,
) -> int:
    """The sums before the gate again, their transpose, and the weights' gradient."""
    return (3 if weight_grad else 2) * convolution_flops(tokens, weights, (height, width))
