"""From effective receptive fields to kernel sizes: what `convert` should put at each site."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from convfusion.analysis.study import Analysis, SiteAnalysis
from convfusion.mixers import DeltaConv, Grid
from convfusion.surgery.config import ConvertConfig

SHARE_OF_FIELD = 0.6  # the kernels of the paper's reference weights over the ERF measured there
REACH = 2 * SHARE_OF_FIELD  # what their coarser stage covers, at half the resolution
FIRST = 1.5  # times its uniform share that a first frame receives where there is a branch
LARGEST = 13  # beyond it another stage is cheaper than a larger kernel
SMALLEST = 3


def recommend(
    analysis: Analysis,
    base: DeltaConv = DeltaConv(),
    *,
    magnitude: bool = False,
    **options: Any,
) -> ConvertConfig:
    """Kernel size and number of stages for every site, from its effective receptive field.

    The rule: K is the odd number nearest to 0.6·ERF, between 3 and 13, and no larger than reaches
    across the grid from any token, 2·side − 1. Stages double the reach: there are as many as it
    takes for K·2^(n−1) ≥ 1.2·ERF, while the coarsest stage keeps at least 2×2 tokens; one stage
    where K = 3 alone covers the field. No ERF at all, uniform attention, counts as 1. These are
    the proportions of the paper's own kernels.

    Of videos the kernel along the frames is the odd number nearest to 0.6·ERF in frames, at most
    the number that reaches across them; 1, each frame by itself, is none. There is a branch for the
    first frame where its tokens receive 1.5 times the uniform share from later frames.

    Sites that are flagged as artefacts say nothing about locality: they take the median field of
    the other sites on their grid, else of all others, else their own.

    Args:
        analysis: of the unconverted model.
        base: settings of everything but kernel size and stages.
        magnitude: take the ERF of |Λ| instead of Λ⁺, which is wider.
        options: of the `ConvertConfig`.
    """
    sites = {}
    for site in analysis.sites:
        kernel, stages = kernel_for(_field(site, analysis.sites, magnitude), site.grid)
        block = replace(base, kernel_size=kernel, stages=stages)
        sites[site.path] = _with_frames(block, site)
    return ConvertConfig(sites=sites, **options)


def kernel_for(field: float, grid: Grid) -> tuple[int, int]:
    """Kernel size and stages for an effective receptive field in space on a grid."""
    grid = grid[-2:]
    widest = min(LARGEST, 2 * max(grid) - 1)
    kernel = min(max(_nearest_odd(SHARE_OF_FIELD * field), SMALLEST), max(widest, 1))
    stages = 1
    if field > SMALLEST:
        while kernel * 2 ** (stages - 1) < REACH * field and min(grid) >= 2 ** (stages + 1):
            stages += 1
    return kernel, stages


def _with_frames(block: DeltaConv, site: SiteAnalysis) -> DeltaConv:
    """A block with what a video needs beside."""
    mean = site.mean
    if mean.frames is None:
        return block
    kernel = min(_nearest_odd(SHARE_OF_FIELD * (mean.frames.receptive_field or 1)), LARGEST)
    kernel = min(kernel, 2 * site.grid[0] - 1)
    first = (mean.gathering.first_frame or 0) >= FIRST
    return replace(block, frame_kernel_size=kernel if kernel > 1 else 0, first_frame_branch=first)


def _nearest_odd(value: float) -> int:
    return 2 * round((value - 1) / 2) + 1


def _field(site: SiteAnalysis, sites: list[SiteAnalysis], magnitude: bool) -> float:
    """ERF of a site's mean map; 1 where attention is uniform, which the mean branch does."""
    others = [s for s in sites if not s.artefact]
    near = [s for s in others if s.grid == site.grid] or others or [site]
    fields = [
        (s.mean.receptive_field_magnitude if magnitude else s.mean.receptive_field) or 1
        for s in (near if site.artefact else [site])
    ]
    return median(fields)
