"""Where attention gathers, whatever the query: in the first frame, in corners, at a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convfusion.analysis.statistics import SINK_TOKENS, as_video
from convfusion.mixers.tokens import Grid


@dataclass(frozen=True)
class Gathering:
    """Attention that a token of some kind receives, over what uniform attention gives every token.

    Attributes:
        first_frame: a token of the first frame, from queries of later ones; None of a single frame.
        corners: a token in a corner of its frame.
        few: one of the strongest hundredth of all tokens, at least of one.
        strongest: the strongest token of all.
    """

    first_frame: float | None
    corners: float
    few: float
    strongest: float


def measure_gathering(
    columns: Tensor, queries: int, to_first: Tensor, late: int, grid: Grid
) -> Tensor:
    """What `Gathering` says of M maps, [4, M], in its order; 0 for what a picture has not.

    Args:
        columns: attention that each key receives, summed over all queries, [M, N].
        queries: how many.
        to_first: attention of the queries in later frames to the first one, [M].
        late: how many queries lie in later frames.
        grid: of the keys.
    """
    received = columns * columns.shape[1] / queries
    few = max(1, int(columns.shape[1] * SINK_TOKENS))
    strongest = received.topk(few, dim=1).values
    first = to_first * as_video(grid)[0] / max(1, late)
    corners = received[:, corner_tokens(grid).to(columns.device)].mean(1)
    return torch.stack([first, corners, strongest.mean(1), strongest[:, 0]])


def corner_tokens(grid: Grid) -> Tensor:
    """The tokens in the corners of each frame, at most four of each."""
    frames, height, width = as_video(grid)
    ends = [row * width + column for row in (0, height - 1) for column in (0, width - 1)]
    corners = torch.tensor(sorted(set(ends)))
    return (torch.arange(frames)[:, None] * height * width + corners).flatten()


def read_gathering(values: Tensor, grid: Grid) -> Gathering:
    """From four numbers in the order of `Gathering`."""
    first, corners, few, strongest = values.tolist()
    return Gathering(first if as_video(grid)[0] > 1 else None, corners, few, strongest)
