"""Neighbourhood attention: each token attends to the window of tokens nearest to it.

As in Hassani et al., "Neighborhood Attention Transformer", CVPR 2023: a window that would leave the
grid moves inwards, so that each query has K·K keys. Exact, in plain PyTorch, in memory linear in N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convfusion.block import Grid

TILE = 8  # queries are worked in tiles of TILE×TILE, which share the keys around them


def neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: int
) -> Tensor:
    """softmax(q·kᵀ/√d)·v over each query's window: [B, h, N, d] → [B, h, N, d].

    A tile of queries needs the keys of one region, (TILE + K − 1) tokens wide; within it a mask
    leaves each query its own window. One row of tiles is worked at a time.

    Args:
        query, key, value: tokens row by row on the grid (H, W), N = H·W.
        grid: (H, W).
        window: side K; along a shorter side of the grid it is that side.
    """
    height, width = grid
    if window >= max(grid):
        return F.scaled_dot_product_attention(query, key, value)
    q, k, v = (x.unflatten(2, grid) for x in (query, key, value))
    down, across = _tiles(height, window, query.device), _tiles(width, window, query.device)
    rows = []
    for queries, keys, row_mask in zip(down.queries, down.keys, down.mask, strict=True):
        # [B, h, tiles, queries or keys of a tile, d]
        part, near_k, near_v = (
            x[:, :, i][:, :, :, j].transpose(2, 3).flatten(3, 4)
            for x, i, j in (
                (q, queries, across.queries),
                (k, keys, across.keys),
                (v, keys, across.keys),
            )
        )
        mask = row_mask[None, :, None, :, None] & across.mask[:, None, :, None, :]
        mixed = F.scaled_dot_product_attention(
            part, near_k, near_v, attn_mask=mask.flatten(3, 4).flatten(1, 2)
        )
        mixed = mixed.unflatten(3, (len(queries), -1)).transpose(2, 3).flatten(3, 4)
        rows.append(mixed[:, :, :, across.place])  # [B, h, tile, W, d]
    return torch.cat(rows, dim=2)[:, :, down.place].flatten(2, 3)


class _Tiles(NamedTuple):
    """The tiles along one side of the grid.

    The last tile is moved inwards where the tile does not divide the side: what two tiles hold is
    worked out twice, and `place` picks one.
    """

    queries: Tensor  # [T, t]
    keys: Tensor  # [T, r], the region that a tile's queries look at
    mask: Tensor  # [T, t, r], which of them each query sees
    place: Tensor  # [side], where each query stands in the concatenated tiles


def _tiles(side: int, window: int, device: torch.device) -> _Tiles:
    window, tile = min(window, side), min(TILE, side)
    region = min(side, tile + window - 1)
    first = torch.arange(0, side, tile, device=device).clamp(max=side - tile)
    queries = first[:, None] + torch.arange(tile, device=device)
    starts = (queries - window // 2).clamp(0, side - window)
    keys = starts[:, :1].clamp(max=side - region) + torch.arange(region, device=device)
    offset = keys[:, None, :] - starts[:, :, None]
    every = torch.arange(side, device=device)
    place = every + (every // tile * tile - first[every // tile])
    return _Tiles(queries, keys, (offset >= 0) & (offset < window), place)
