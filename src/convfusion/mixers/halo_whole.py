"""A halo block in one piece: what `torch.compile` and the export to ONNX trace.

The same as the chunks of `mixers.halo` compute, which take fewer and smaller copies. In an exported
program sides are symbols, and products of rounded sides are what makes tracing slow; so each axis
of the grid keeps a dimension of its own here, and is indexed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convfusion.mixers.halo_grid import NEVER, GridLine, pool_cells

if TYPE_CHECKING:
    from convfusion.mixers.halo import HaloMixer


def mix_whole(mixer: HaloMixer, tokens: Tensor, lines: Sequence[GridLine]) -> Tensor:
    """What each head gathers, side by side: [B, N, C] → [B, N, h·n]."""
    device, r, n = tokens.device, mixer.key_rank, mixer.value_rank
    sides = [line.side for line in lines]
    queries = [line.list_queries(device).clamp(max=line.side - 1) for line in lines]
    keys = [line.list_keys(device).clamp(max=line.side - 1) for line in lines]
    query = _take(mixer.read_queries(tokens).unflatten(1, sides), queries, r)
    near = _take(mixer.read_keys(tokens).unflatten(1, sides), keys, r + n)
    cells = mixer.read_keys(pool_cells(tokens, lines))
    cells = cells.unflatten(2, (mixer.heads, -1)).transpose(1, 2)
    far = _index(cells, 1, *[None] * len(lines)).expand(*near.shape[:-2], -1, -1)
    key, value = torch.cat([near, far], dim=-2).split((r, n), dim=-1)
    bias = _lay_out_bias(mixer, lines, device).to(query.dtype)
    scores = query @ key.transpose(-1, -2) + bias
    mixed = mixer.finish_rows(scores.softmax(-1).to(value.dtype) @ value, scores)
    return _put_back(mixed, lines).flatten(1, len(lines)).flatten(2)


def _take(maps: Tensor, places: Sequence[Tensor], channels: int) -> Tensor:
    """Patches of maps: [B, sides…, h·c] and [blocks, p] of each axis → [B, blocks…, h, Πp, c]."""
    axes = len(places)
    for axis, place in enumerate(places):
        maps = _index(maps, 2 * axis + 1, place)
    maps = maps.unflatten(-1, (-1, channels))  # [B, blocks, p, blocks, p, …, h, c]
    blocks, within = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    maps = maps.permute(0, *blocks, 2 * axes + 1, *within, 2 * axes + 2)
    return maps.flatten(-1 - axes, -2)


def _index(maps: Tensor, axis: int, *places: Tensor | None) -> Tensor:
    """Maps indexed from an axis on; those before it are left whole."""
    before: list[Any] = [slice(None)] * axis
    return maps[(*before, *places)]


def _lay_out_bias(mixer: HaloMixer, lines: Sequence[GridLine], device: torch.device) -> Tensor:
    """ρ beside log n + λ: [blocks…, h, Πb, Πw + M]."""
    axes = len(lines)
    near: Tensor = mixer.relative
    for axis, line in enumerate(lines):
        near = _index(near, 3 * axis + 1, line.list_offsets(device))
    groups = [range(first, 3 * axes + 1, 3) for first in (1, 2, 3)]  # blocks, queries and keys
    near = near.permute(*groups[0], 0, *groups[1], *groups[2])  # [blocks…, h, b…, w…]
    near = near.flatten(-axes).flatten(axes + 1, -2)
    inside = _multiply([line.list_keys(device) < line.side for line in lines])
    near = near.masked_fill(~inside[..., None, None, :], NEVER)
    sizes, held = zip(*(line.count_cells(device) for line in lines), strict=True)
    outside = _multiply([each[None] for each in sizes]) - _multiply(held)  # [blocks…, M]
    counted = torch.where(outside > 0, outside.clamp(min=1).float().log(), NEVER)
    far = counted.to(near.dtype)[..., None, None, :] + mixer.far[:, None, None]
    return torch.cat([near, far.expand(*near.shape[:-1], -1)], dim=-1)


def _multiply(lines: Sequence[Tensor]) -> Tensor:
    """Products over all combinations: [blocks, p] of each axis → [blocks…, Πp]."""
    axes, total = len(lines), torch.ones((), dtype=lines[0].dtype, device=lines[0].device)
    for axis, line in enumerate(lines):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = line.shape
        total = total * line.view(shape)
    return total.flatten(axes)


def _put_back(mixed: Tensor, lines: Sequence[GridLine]) -> Tensor:
    """What the blocks gathered, at its tokens: [B, blocks…, h, Πb, n] → [B, sides…, h, n]."""
    axes = len(lines)
    mixed = mixed.unflatten(-2, [line.block for line in lines])
    order = [place for axis in range(axes) for place in (1 + axis, axes + 2 + axis)]
    mixed = mixed.permute(0, *order, axes + 1, -1)
    for axis, line in enumerate(lines):
        place = torch.arange(line.side, device=mixed.device)
        mixed = _index(mixed, axis + 1, place // line.block, place % line.block)
    return mixed
