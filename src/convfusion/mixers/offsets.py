"""The mean of an attention at each offset of a key from its query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convfusion.mixers.tokens import Grid

QUERIES = 256  # of a picture, that a start and its error are measured on
WORKED = 2**24  # pairs of query and key, over all maps, that are worked on at once


def choose_queries(tokens: int, count: int, seed: int = 0) -> Tensor:
    """Token indices in ascending order: all, or so many at random, the same at every call."""
    if tokens <= count:
        return torch.arange(tokens)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def split_queries(chosen: Tensor, maps: int, tokens: int) -> Sequence[Tensor]:
    """Chosen queries in parts whose `maps` maps of N keys take little memory."""
    return chosen.split(max(1, WORKED // (maps * tokens)))


class OffsetMeans(NamedTuple):
    """What queries give to the key at each offset from them, the offset 0 in the middle.

    Attributes:
        kernels: a_h(Δ), [h, 2R + 1 along each axis], the mean attention of the queries that have
            that key.
        share: [2R + 1 along each axis], the share of all queries of the grid that have it; at a
            border some keys are missing.
        first: attention of each head to the first place of the first axis, of a video the first
            frame, in so far as it lies outside of the window; [h], the mean over all queries.
    """

    kernels: Tensor
    share: Tensor
    first: Tensor

    def outside(self) -> Tensor:
        """Attention of each head beyond the window, [h] from 0 to 1: the mean over all queries."""
        return (1 - (self.kernels * self.share).flatten(1).sum(1)).clamp(0, 1)


@torch.no_grad()
def offset_means(
    query: Tensor,
    key: Tensor,
    scale: float,
    grid: Grid,
    radii: Sequence[int],
    chosen: Tensor,
) -> OffsetMeans:
    """Mean attention of each head to the key at each offset, such as (Δrow, Δcolumn), from a query.

    Of the chosen queries, those count that have a key at that offset. Offsets that none has get 0.

    Args:
        query: [h, N, d] of h heads; worked in float32 whatever its dtype.
        key: [h, N, d].
        scale: usually 1/√d.
        grid: (H, W) or (T, H, W) with N places.
        radii: R, the largest offset along each axis.
        chosen: indices of queries.

    Returns:
        The means and how many queries have each key, in float64.
    """
    key = key.float().transpose(1, 2)
    sides, heads, tokens = [2 * most + 1 for most in radii], len(query), key.shape[2]
    kind, device = precise(query.device), query.device
    length = math.prod(sides)
    sums = torch.zeros(heads, length + 1, dtype=kind, device=device)
    counts = torch.zeros(length + 1, dtype=kind, device=device)
    first = torch.zeros(heads, dtype=kind, device=device)
    lines = place_offsets(grid, radii, device)
    for part in split_queries(chosen.to(device), heads, tokens):
        bins, near = find_offsets(lines, radii, grid, part)
        maps = torch.softmax(query[:, part].float() @ key * scale, dim=-1)
        sums += ring_sums(maps, bins, length + 1)
        counts += torch.bincount(bins.flatten(), minlength=length + 1)
        early = slice(tokens // grid[0])
        first += (maps * ~near)[..., early].sum((1, 2))
    kernels = (sums / counts.clamp(min=1))[:, :-1].unflatten(1, sides)
    share = torch.ones((), dtype=kind, device=device)
    for most, side in zip(radii, grid, strict=True):
        away = torch.arange(-most, most + 1, dtype=kind, device=device).abs()
        share = share[..., None] * (1 - away / side).clamp(min=0)
    return OffsetMeans(kernels, share, first / len(chosen))


def mean_offsets(parts: list[OffsetMeans]) -> OffsetMeans:
    """The means over several pictures, whose grids may differ; every picture counts alike.

    The kernels are means over the queries that have each key, whatever their picture: a small grid
    says nothing of the offsets that reach beyond it. `outside` is the mean of the pictures' own.
    """
    shares = torch.stack([means.share for means in parts])
    sums = torch.stack([means.kernels * means.share for means in parts]).sum(0)
    total = shares.sum(0)
    first = torch.stack([means.first for means in parts]).mean(0)
    return OffsetMeans(torch.where(total > 0, sums / total, 0.0), total / len(parts), first)


def sum_by_offset(
    query: Tensor, key: Tensor, grid: Grid, reach: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sums of q·k over the pairs at each offset of a key from its query, and their numbers.

    Args:
        query, key: [B, h, N, d], row by row on the grid.
        grid: (H, W) or (T, H, W).
        reach: the largest offset along each axis.

    Returns:
        [h, D + 1] and [D + 1]; the offsets lie row by row from −reach to +reach,
        D = Π(2·reach + 1), and last come all pairs that are farther apart.
    """
    device, length = query.device, math.prod(2 * most + 1 for most in reach)
    lines = place_offsets(grid, reach, device)
    sums = query.new_zeros(query.shape[1], length + 1)
    counts = query.new_zeros(length + 1)
    chosen = choose_queries(query.shape[2], QUERIES).to(device)
    for part in split_queries(chosen, query.shape[0] * query.shape[1], query.shape[2]):
        place = find_offsets(lines, reach, grid, part)[0].flatten()
        scores = (query[:, :, part] @ key.transpose(2, 3)).sum(0).flatten(1)
        sums.index_add_(1, place, scores)
        counts += torch.bincount(place, minlength=length + 1) * query.shape[0]
    return sums, counts


def place_offsets(
    grid: Grid, reach: Sequence[int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Of each axis, for every place and every other: the offset, from 0, and whether it counts."""
    found = []
    for side, most in zip(grid, reach, strict=True):
        line = torch.arange(side, device=device)
        away = line - line[:, None]
        found.append((away.clamp(-most, most) + most, away.abs() <= most))
    return found


def find_offsets(
    lines: Sequence[tuple[Tensor, Tensor]], reach: Sequence[int], grid: Grid, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """The offset of every key from some queries, and whether it is one that counts; [Q, N] each.

    Offsets lie row by row from −reach to +reach; those that do not count are one beyond the last.

    Args:
        lines: as `place_offsets` gives them.
        reach: the largest offset along each axis.
        grid: of the tokens.
        queries: their indices.
    """
    sides = [2 * most + 1 for most in reach]
    place = take_rows([offsets for offsets, _ in lines], sides, grid, queries)
    near = take_rows([inside for _, inside in lines], None, grid, queries)
    return torch.where(near, place, math.prod(sides)), near


def take_rows(
    lines: Sequence[Tensor], sizes: Sequence[int] | None, grid: Grid, queries: Tensor
) -> Tensor:
    """What some queries have of every key, [Q, N], put together from what holds along each axis."""
    parts, rest = [], queries
    for line, side in zip(reversed(lines), reversed(grid), strict=True):
        parts.append(line[rest % side])  # [Q, side]
        rest = rest // side
    parts.reverse()
    total = parts[0]
    for axis, part in enumerate(parts[1:], 1):
        if sizes is None:
            total = (total[:, :, None] & part[:, None]).flatten(1)
        else:
            total = (total[:, :, None] * sizes[axis] + part[:, None]).flatten(1)
    return total


def ring_sums(maps: Tensor, distances: Tensor, count: int) -> Tensor:
    """Σ over queries and the keys at distance d from them; [M, Q, N] → float64 [M, D].

    Args:
        maps: M maps.
        distances: [Q, N], as from `chebyshev`.
        count: D.
    """
    offsets = torch.arange(len(maps), device=maps.device)[:, None] * count
    bins = (offsets + distances.flatten()[None]).flatten()
    kind = precise(maps.device)
    sums = torch.zeros(len(maps) * count, dtype=kind, device=maps.device)
    return sums.index_add_(0, bins, maps.to(kind).flatten()).view(len(maps), count)


def precise(device: torch.device) -> torch.dtype:
    """The dtype that sums are taken in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
