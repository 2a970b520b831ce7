"""What PyTorch's counter says of the operation, which it could not look into.

Apart from `library`, since PyTorch's counter imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from convfusion.ops import library, reference  # noqa: F401 - `library` registers the operations


def convolution_flops(tokens: Sequence[int], weights: Sequence[int], grid: tuple[int, int]) -> int:
    """Operations of the depthwise convolutions, two per multiply-add; gates are not counted.

    Args:
        tokens: their shape (B, N, C').
        weights: their shape (n, K·K, C').
        grid: (H, W).
    """
    stages, taps, channels = weights
    pixels = sum(height * width for height, width in reference.pooled_sides(grid, stages))
    return 2 * tokens[0] * pixels * taps * channels


@register_flop_formula([torch.ops.convfusion.pyramid])
def _(tokens: Any, weights: Any, height: int, width: int, *args: Any, **kwargs: Any) -> int:
    return convolution_flops(tokens, weights, (height, width))


@register_flop_formula([torch.ops.convfusion.pyramid_backward])
def _(
    grad: Any,
    tokens: Any,
    weights: Any,
    height: int,
    width: int,
    gate: str,
    weight_grad: bool,
    **kwargs: Any,
) -> int:
    """The sums before the gate again, their transpose, and the weights' gradient."""
    return (3 if weight_grad else 2) * convolution_flops(tokens, weights, (height, width))
