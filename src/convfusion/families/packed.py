"""Latents as tokens of 2×2 squares, as FLUX and Qwen-Image pack them."""

from __future__ import annotations

from torch import Tensor

from convfusion.mixers.tokens import Grid

SIDE = 2  # of a square


def pack_squares(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H/2·W/2, 4·C], row by row."""
    squares = latents.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # [B, C, H/2, 2, W/2, 2]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_squares(packed: Tensor, sides: Grid) -> Tensor:
    """The reverse, for latents of these sides (H, W)."""
    height, width = (side // SIDE for side in sides)
    squares = packed.unflatten(2, (-1, SIDE, SIDE)).unflatten(1, (height, width))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
