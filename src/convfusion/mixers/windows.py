"""Local attention: each token attends to the tokens of a window round it.

Exact, in plain PyTorch, in memory linear in N. The square window is that of Hassani et al.,
"Neighborhood Attention Transformer", CVPR 2023: one that would leave the grid moves inwards, so
that each query has K·K keys. The circular one is that of Liu et al., "CLEAR", arXiv 2412.16112.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convfusion.mixers.tokens import Grid

TILE = 8  # queries are worked in tiles of TILE×TILE, which share the keys around them


def neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: int
) -> Tensor:
    """softmax(q·kᵀ/√d)·v over each query's square window: [B, h, N, d] → [B, h, N, d].

    Args:
        query, key, value: tokens row by row on the grid (H, W), N = H·W.
        grid: (H, W).
        window: side K; along a shorter side of the grid it is that side.
    """
    height, width = grid
    if window >= max(grid):
        return F.scaled_dot_product_attention(query, key, value)
    tall, wide = min(window, height), min(window, width)

    def visible(dy: Tensor, dx: Tensor) -> Tensor:
        return (dy >= 0) & (dy < tall) & (dx >= 0) & (dx < wide)

    down = _tiles(height, tall, query.device, inwards=True)
    across = _tiles(width, wide, query.device, inwards=True)
    return _attend(query, key, value, down, across, visible)


def circular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    radius: int,
    common: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√d)·v over the keys nearer than the radius: [B, h, N, d] → [B, h, N, d].

    Args:
        query, key, value: tokens row by row on the grid (H, W), N = H·W.
        grid: (H, W).
        radius: r; a query sees the keys at an Euclidean distance < r on the grid.
        common: keys and values [B, h, M, d] that every query sees as well.
    """
    height, width = grid
    reach = radius - 1

    def visible(dy: Tensor, dx: Tensor) -> Tensor:
        return (dy - reach) ** 2 + (dx - reach) ** 2 < radius**2

    down = _tiles(height, 2 * reach + 1, query.device, inwards=False)
    across = _tiles(width, 2 * reach + 1, query.device, inwards=False)
    return _attend(query, key, value, down, across, visible, common)


class _Tiles(NamedTuple):
    """The tiles along one side of the grid.

    The last tile is moved inwards where the tile does not divide the side: what two tiles hold is
    worked out twice, and `place` picks one.
    """

    queries: Tensor  # [T, t]
    keys: Tensor  # [T, r], the region that a tile's queries look at
    offset: Tensor  # [T, t, r], where each key stands from the start of each query's window
    place: Tensor  # [side], where each query stands in the concatenated tiles


def _tiles(side: int, window: int, device: torch.device, *, inwards: bool) -> _Tiles:
    """Tiles for windows round each query; `inwards` moves those that would leave the grid."""
    tile = min(TILE, side)
    region = min(side, tile + window - 1)
    first = torch.arange(0, side, tile, device=device).clamp(max=side - tile)
    queries = first[:, None] + torch.arange(tile, device=device)
    starts = queries - window // 2
    if inwards:
        starts = starts.clamp(0, side - window)
    keys = starts[:, :1].clamp(0, side - region) + torch.arange(region, device=device)
    every = torch.arange(side, device=device)
    place = every + (every // tile * tile - first[every // tile])
    return _Tiles(queries, keys, keys[:, None, :] - starts[:, :, None], place)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    down: _Tiles,
    across: _Tiles,
    visible: Callable[[Tensor, Tensor], Tensor],
    common: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of every query to the keys that `visible` leaves it, and to the common ones.

    A tile of queries needs the keys of one region; within it a mask leaves each query its own
    window. One row of tiles is worked at a time.
    """
    q, k, v = (x.unflatten(2, (len(down.place), len(across.place))) for x in (query, key, value))
    rows = []
    for queries, keys, offset in zip(down.queries, down.keys, down.offset, strict=True):
        # [B, h, tiles, queries or keys of a tile, d]
        part, near_k, near_v = (
            x[:, :, i][:, :, :, j].transpose(2, 3).flatten(3, 4)
            for x, i, j in (
                (q, queries, across.queries),
                (k, keys, across.keys),
                (v, keys, across.keys),
            )
        )
        mask = visible(offset[None, :, None, :, None], across.offset[:, None, :, None, :])
        mask = mask.flatten(3, 4).flatten(1, 2)
        if common is not None:
            near_k, near_v = (
                torch.cat([near, each[:, :, None].expand(-1, -1, len(mask), -1, -1)], dim=3)
                for near, each in zip((near_k, near_v), common, strict=True)
            )
            mask = torch.cat([mask, mask.new_ones(*mask.shape[:2], common[0].shape[2])], dim=2)
        mixed = F.scaled_dot_product_attention(part, near_k, near_v, attn_mask=mask)
        mixed = mixed.unflatten(3, (len(queries), -1)).transpose(2, 3).flatten(3, 4)
        rows.append(mixed[:, :, :, across.place])  # [B, h, tile, W, d]
    return torch.cat(rows, dim=2)[:, :, down.place].flatten(2, 3)
