"""How far a mixer looks: the share of a grid's tokens that its window or its kernel holds."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from convfusion import DeltaConv
from convfusion.families import denoiser_of, list_sites, site_grid
from convfusion.mixers import Circular, Depthwise, Halo, Neighbourhood, Removed
from convfusion.mixers.tokens import Grid
from convfusion.operations import pairs_in_windows
from convfusion.surgery import mixers_of


def window_share(pipe: Any, latents: tuple[int, int]) -> float:
    """The largest share that a mixer holds of the largest grid that has one.

    Args:
        pipe: a converted pipeline.
        latents: (height, width) of its latents.
    """
    model = denoiser_of(pipe)
    mixers = mixers_of(model)
    held: dict[Grid, float] = {}
    for site in list_sites(model):
        if site.path in mixers:
            grid = site_grid(model, site, latents)
            held[grid] = max(held.get(grid, 0.0), share_of(mixers[site.path].config, grid))
    return held[max(held, key=prod)]


def share_of(mixer: Any, grid: tuple[int, int]) -> float:
    """Tokens within the window or the widest kernel of a mixer, over those of a grid (H, W).

    The circle is that of the mean token, as the border cuts it off. A kernel of a coarse scale is
    as wide as the tokens that it averages. What summarises the whole grid beside a window (pooled
    cells, a mean) does not count; what has no window holds everything.
    """
    match mixer:
        case Removed():
            return 0.0
        case Circular():
            return pairs_in_windows(replace(mixer, mean_token=False), grid) / prod(grid) ** 2
        case Halo():
            sides = mixer.sides("window")
        case Neighbourhood():
            sides = (mixer.window,) * 2
        case Depthwise():
            sides = (mixer.kernel_size,) * 2
        case DeltaConv():
            sides = (mixer.kernel_size * 2 ** (mixer.stages - 1),) * 2
        case _:
            return 1.0
    return prod(min(own, side) for own, side in zip(sides, grid, strict=True)) / prod(grid)
