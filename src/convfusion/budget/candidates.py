"""What may stand at a site: what it costs, and how far it is expected to be from the attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from convfusion.budget.knapsack import list_undominated
from convfusion.budget.moments import Reach, SiteMoments
from convfusion.mixers import DeltaConv, Halo, MeanOnly, Mixer
from convfusion.mixers.halo import Sides
from convfusion.mixers.tokens import Grid
from convfusion.operations import image_operations, mixer_operations

KERNEL = 7  # of the ΔConvBlocks
FRAME_KERNEL = 3  # of those for videos, along the frames
REACHES = {2: Reach(4, 8, 4), 3: Reach((2, 4, 4), (4, 8, 8), (3, 4, 4))}  # by rank, unmeasured
# By rising cost, where text and image share an attention and ranks are full.
SHARED_REACHES = {
    2: tuple(
        Reach(*sides)
        for sides in (
            *((4, 6, 1), (4, 6, 4), (4, 8, 4), (4, 10, 4)),
            *((4, 10, 8), (4, 12, 8), (8, 16, 4), (8, 16, 8)),
        )
    ),
    3: (REACHES[3],),
}
STEPS = 16  # of blocks that are alike everywhere


@dataclass(frozen=True)
class Shape:
    """What the operations of a mixer depend on.

    Attributes:
        channels, heads: of the site.
        grid: (H, W) or (T, H, W) of the tokens.
        kept: operations that stay whatever is chosen, where text and image share the attention: of
            its projections, and of what involves the text. None where the image has it alone.
    """

    channels: int
    heads: int
    grid: Grid
    kept: int | None = None


@dataclass(frozen=True)
class Candidate:
    """Something that may stand at a site.

    Attributes:
        mixer: its settings; None for the attention itself.
        error: the imitation error that is predicted, before any training.
    """

    mixer: Mixer | None
    error: float


def list_candidates(moments: SiteMoments, grid: Grid) -> list[Candidate]:
    """All that may stand at a site, with predicted imitation errors.

    A halo block loses something by its cut scores, by its cut values and by what it does not see;
    where text and image share the attention, by that alone, since nothing is cut there.
    Each was measured with the other two whole. If each leaves a share 1 − e of the attention
    right, all three leave the product of these shares: 1 − Π(1 − e), which is nearly the sum where
    errors are small. How they act on each other is left out: it is a prediction, and no bound.

    Args:
        moments: of the site.
        grid: (H, W) or (T, H, W) of the tokens to plan for.
    """
    halo = (
        Candidate(set_halo(reach, key.ratio, value.ratio), add_errors(key.error, value.error, seen))
        for reach, seen in distinct_reaches(moments, grid)
        for key in moments.scores
        for value in moments.values
    )
    others = (
        Candidate(None, 0.0),
        Candidate(set_delta_conv(len(grid)), moments.delta_conv),
        Candidate(MeanOnly(), moments.mean_only),
    )
    return [*others, *halo]


def add_errors(*errors: float) -> float:
    """1 − Π(1 − e) of errors below 1; the largest, where one is not."""
    most = max(errors)
    return most if most >= 1 else 1 - math.prod(1 - error for error in errors)


def distinct_reaches(moments: SiteMoments, grid: Grid) -> list[tuple[Reach, float]]:
    """The measured reaches; of those that see all of a grid, which are one, the cheapest."""
    chosen: dict[Reach | str, tuple[Reach, float]] = {}
    for reach, error in sorted(moments.far, key=lambda row: row.reach):
        chosen.setdefault("all" if covers(reach, grid) else reach, (reach, error))
    return list(chosen.values())


def covers(reach: Reach, grid: Grid) -> bool:
    """Whether a window holds all tokens of a grid."""
    windows = reach.window if isinstance(reach.window, tuple) else (reach.window,) * len(grid)
    return all(window >= side for window, side in zip(windows, grid, strict=True))


def set_delta_conv(rank: int) -> DeltaConv:
    """Settings of the ΔConvBlock that may stand at a site, by the rank of its grid."""
    if rank == 2:
        return DeltaConv(kernel_size=KERNEL)
    return DeltaConv(kernel_size=KERNEL, frame_kernel_size=FRAME_KERNEL, first_frame_branch=True)


@cache
def set_halo(reach: Reach, key_ratio: float, value_ratio: float) -> Halo:
    """Settings of a halo block."""
    return Halo(reach.block, reach.window, reach.cells, key_ratio, value_ratio)


def list_uniform(rank: int = 2) -> Iterator[Halo]:
    """Halo blocks by rising cost: ranks in steps of a sixteenth, values a quarter above keys.

    Args:
        rank: of the grids that they are for.
    """
    for step in range(1, STEPS + 1):
        share = step / STEPS
        yield set_halo(REACHES[rank], share, min(1.0, share + 0.25))


def list_shared(rank: int = 2) -> Iterator[Halo]:
    """As many for attentions that text and image share: of all channels, by how far they see."""
    reaches = SHARED_REACHES[rank]
    for step in range(STEPS):
        yield set_halo(reaches[step * len(reaches) // STEPS], 1.0, 1.0)


def count_operations(mixer: Mixer, shape: Shape) -> int:
    """Operations of a mixer for one sample, by the project's counter, and what stays beside it."""
    counted = _count_halo if isinstance(mixer, Halo) and shape.kept is None else _count
    return counted(mixer, shape)  # type: ignore[arg-type]  # settings are frozen


@cache
def _count_halo(mixer: Halo, shape: Shape) -> int:
    none, per_key, per_value = _halo_law(mixer.block, mixer.window, mixer.cells, shape)
    keys, values = halo_channels(mixer, shape)
    return none + per_key * keys + per_value * values


def halo_channels(mixer: Halo, shape: Shape) -> tuple[int, int]:
    """Channels of all keys and of all values of a halo block."""
    return _channels(mixer.key_ratio, mixer.value_ratio, shape.channels, shape.heads)


@cache
def _channels(key_ratio: float, value_ratio: float, channels: int, heads: int) -> tuple[int, int]:
    with torch.device("meta"):
        built = set_halo(REACHES[2], key_ratio, value_ratio).build(channels, heads)
    return built.to_q.out_features, built.to_out.in_features


@cache
def _halo_law(block: Sides, window: Sides, cells: Sides, shape: Shape) -> tuple[int, int, int]:
    """Operations without channels, for each channel of the keys, and for each of the values.

    Every product of a halo block has either of them as one of its sides, so that three counts tell
    the operations of all its ranks.
    """
    whole, fewer_keys, fewer_values = (
        Halo(block, window, cells, *ratios) for ratios in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))
    )
    most, half = halo_channels(whole, shape)[0], halo_channels(fewer_keys, shape)[0]
    full = _count(whole, shape)
    if half == most:  # a head of one channel has no other rank
        return full, 0, 0
    per_key = (full - _count(fewer_keys, shape)) // (most - half)
    per_value = (full - _count(fewer_values, shape)) // (most - half)
    return full - (per_key + per_value) * most, per_key, per_value


@cache
def _count(mixer: Mixer, shape: Shape) -> int:
    if shape.kept is not None:
        own = image_operations(mixer, shape.channels, shape.heads, shape.grid)
        return shape.kept + own
    with torch.device("meta"):
        built = mixer.build(shape.channels, shape.heads)
        tokens = torch.empty(1, math.prod(shape.grid), shape.channels)
    return mixer_operations(built, tokens, shape.grid)


def keep_undominated(
    candidates: Sequence[Candidate], costs: Sequence[float]
) -> list[tuple[Candidate, float]]:
    """The candidates that no other one beats in cost and error, the cheapest first."""
    options = [(cost, each.error) for each, cost in zip(candidates, costs, strict=True)]
    return [(candidates[i], costs[i]) for i in list_undominated(options)]
