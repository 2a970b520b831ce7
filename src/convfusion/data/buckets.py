"""Buckets: the few sizes, and lengths of clips, that the samples of a training set have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from convfusion.errors import ConvFusionError
from convfusion.families import pixel_unit

Size = tuple[int, int]  # (height, width) in pixels
Extent = tuple[int, ...]  # the same of a picture; (frames, height, width) of a clip


def list_buckets(size: Size, step: int, max_ratio: float = 2.0) -> list[Size]:
    """Sizes of about the same area, from upright to lying.

    Args:
        size: (height, width) whose area none of them exceeds; it is one of them itself.
        step: in pixels; the sides of the others are multiples of it.
        max_ratio: of the longer side to the shorter one, at least 1.

    Returns:
        (height, width) of each, none of them inside of another one, by rising ratio of width to
        height.

    Raises:
        ConvFusionError: a number is out of range.
    """
    if min(size) < 1 or step < 1 or not max_ratio >= 1:
        raise ConvFusionError("size and step must be at least 1, and max_ratio too")
    area = size[0] * size[1]
    sizes = {size}
    for side in range(step, math.isqrt(int(area * max_ratio)) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= max_ratio * min(side, other):
            sizes |= {(side, other), (other, side)}
    kept = [
        size
        for size in sizes
        if not any(size != o and size[0] <= o[0] and size[1] <= o[1] for o in sizes)
    ]
    return sorted(kept, key=lambda size: (size[1] / size[0], size))


def choose_nearest(sizes: Sequence[Size], picture: Size) -> Size:
    """The size whose ratio of sides is nearest to a picture's, by ratio of ratios.

    Args:
        sizes: (height, width) to choose from; of equally near ones the largest is taken.
        picture: (height, width).
    """
    ratio = math.log(picture[1] / picture[0])
    return min(sizes, key=lambda s: (round(abs(math.log(s[1] / s[0]) - ratio), 9), -s[0] * s[1], s))


def list_lengths(frames: int, scale: int) -> list[int]:
    """Numbers of frames that clips are cut to: all, about half and about a quarter.

    Each is 1 more than a multiple of the frames per frame of latents.

    Args:
        frames: the most.
        scale: frames of a video per frame of its latents.
    """
    latents = (frames - 1) // scale
    parts = dict.fromkeys([latents, latents // 2, latents // 4])
    return [scale * part + 1 for part in parts if part]


def choose_step(pipe: Any, size: Size) -> int:
    """The step of a pipeline's buckets about a size that it can draw.

    64 pixels for the large models; less for sizes below 512, of which 64 would be a coarse part.
    Always a multiple of what the pipeline can draw.
    """
    unit = pixel_unit(pipe)
    most = max(unit, min(64, min(size) // 8))
    return most // unit * unit
