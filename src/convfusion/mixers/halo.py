"""The halo block: attention of low rank within a window, and to a few pooled tokens beyond it.

Queries are worked in blocks of b tokens a side. All queries of a block share a window of w keys a
side, which moves inwards at the border. The grid is parted into M = cells² cells; each cell is one
more key, that of its mean token, weighted by how many of its tokens lie outside of the window:

    q = W_q·x  [h·r]      (k, v) = W_kv·x  [h·(r + n)]      (k̄_c, v̄_c) = means over the cell c
    s_ij = q_i·k_j + ρ_h(j − i)             for j in the window of i's block
    s_ic = q_i·k̄_c + log n_ic + λ_h         n_ic: tokens of the cell c outside of that window
    out_i = W_o·concat_h [softmax(s_i)·(v ; v̄)] + b_o

with r = key_ratio·d and n = value_ratio·d for heads of d = C/h channels. With r = n = d and a
window over the whole grid it is the attention that it replaces. The cost is linear in the tokens:
2·2·C·h·(r + n) for the projections of a token, and 2·(w² + M)·h·(r + n) for what it attends to.

Known parts: blocks of queries with a halo of keys (Vaswani et al., "Scaling Local Self-Attention
for Parameter Efficient Visual Backbones", arXiv 2103.12731); keys of a window and pooled keys in
one softmax (Yang et al., "Focal Self-Attention", arXiv 2107.00641); the logarithm of a count as a
bias (Bolya et al., "Token Merging", arXiv 2210.09461).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from convfusion.errors import ConvFusionError
from convfusion.mixers import halo_start
from convfusion.mixers.base import TokenMixer, check_grid
from convfusion.mixers.halo_grid import (
    NEVER,
    Chunk,
    GridLine,
    Rows,
    count_outside,
    cut_into_chunks,
    pool_cells,
    recall,
)
from convfusion.mixers.halo_whole import mix_whole
from convfusion.mixers.tokens import Grid, TokenSample
from convfusion.settings import check_fields

if TYPE_CHECKING:
    from convfusion.mixers.joint import JointMixer

MAX_SIDE = 64  # of blocks, windows and cells: beyond it the attention itself is cheaper
CHUNK = 512  # tokens worked at a time on a CPU, whose caches hold what they need
LARGE_CHUNK = 2**16  # elsewhere, which bounds the memory of large pictures
FUSED = ("cuda",)  # kinds of devices whose fused attention is faster than products and a softmax,
FUSED_FROM = 128  # where a block sees at least so many keys: below, starting it takes longer
RECOMPUTED = 8192  # tokens of a call from which on training recomputes every chunk

Sides = int | tuple[int, ...]  # one number for every axis of the grid, or one for each


@dataclass(frozen=True)
class Halo:
    """Settings of a halo block; see the module's equations.

    For videos, whose grids are (T, H, W), give at least one of the first three as three numbers.

    Attributes:
        block: side b of a block of queries, in tokens.
        window: side w of the window of keys that a block shares, in tokens; at least `block`.
        cells: cells a side that the grid is parted into; 0 for none, so that nothing beyond the
            window is seen.
        key_ratio: r/d, the rank of the scores of a head over its channels; above 0, at most 1.
        value_ratio: n/d, the rank of its values.
    """

    block: Sides = 4
    window: Sides = 8
    cells: Sides = 4
    key_ratio: float = 0.25
    value_ratio: float = 0.5

    def __post_init__(self) -> None:
        for name in ("block", "window", "cells"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
        check_fields(self)
        for name, least in (("block", 1), ("window", 1), ("cells", 0)):
            _check_sides(name, getattr(self, name), least)
        lengths = {len(s) for s in (self.block, self.window, self.cells) if isinstance(s, tuple)}
        if len(lengths) > 1:
            raise ConvFusionError("block, window and cells must have a number for each axis alike")
        for block, window in zip(self.sides("block"), self.sides("window"), strict=True):
            if window < block:
                raise ConvFusionError(f"window must be at least block: {window} is below {block}")
        for name in ("key_ratio", "value_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ConvFusionError(
                    f"{name} must lie above 0 and be at most 1, not {getattr(self, name)}"
                )

    @property
    def rank(self) -> int:
        """Of the grids that it is for: 2, or 3 where sides are given as three numbers."""
        given = (self.block, self.window, self.cells)
        return max([2, *(len(sides) for sides in given if isinstance(sides, tuple))])

    def sides(self, name: str) -> tuple[int, ...]:
        """`block`, `window` or `cells` along each axis of the grid."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.rank

    def build(self, channels: int, heads: int = 1) -> HaloMixer:
        return HaloMixer(channels, heads, self)

    def build_joint(self, channels: int, heads: int) -> JointMixer:
        """For attention that text and image share: see `joint_halo`."""
        from convfusion.mixers.joint_halo import JointHaloMixer

        return JointHaloMixer(channels, heads, self)


def _check_sides(name: str, value: Any, least: int) -> None:
    sides = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len(value) not in (2, 3):
        raise ConvFusionError(f"{name} must be one number, or 2 or 3 of them, not {value!r}")
    if any(type(side) is not int or not least <= side <= MAX_SIDE for side in sides):
        raise ConvFusionError(
            f"{name} must be whole numbers from {least} to {MAX_SIDE}, not {value!r}"
        )


class HaloMixer(TokenMixer):
    """A token mixer of low-rank attention; see the module's equations.

    Attributes:
        to_q: C → h·r.
        to_kv: C → h·(r + n); head by head its key, then its value.
        to_out: h·n → C.
        relative: ρ, [h, 2w − 1 along each axis], by the offset of a key from its query.
        far: λ, [h].
        large_chunk: tokens worked at a time elsewhere than on a CPU.
        may_fuse: whether fused attention may do it, which tells no sums of its softmax.

    Raises:
        ConvFusionError: the heads do not divide the channels.
    """

    has_measured_start = True
    large_chunk = LARGE_CHUNK
    may_fuse = True

    def __init__(self, channels: int, heads: int, config: Halo) -> None:
        super().__init__()
        if channels % heads:
            raise ConvFusionError(f"{heads} heads do not divide {channels} channels")
        size = channels // heads
        self.config, self.heads = config, heads
        self.ranks = (config.rank,)
        self.sides = tuple(config.sides(name) for name in ("block", "window", "cells"))
        self.key_rank = max(1, round(size * config.key_ratio))
        self.value_rank = max(1, round(size * config.value_ratio))
        self.to_q = nn.Linear(channels, heads * self.key_rank)
        self.to_kv = nn.Linear(channels, heads * (self.key_rank + self.value_rank))
        self.to_out = nn.Linear(heads * self.value_rank, channels)
        reach = [2 * window - 1 for window in config.sides("window")]
        self.relative = nn.Parameter(torch.zeros(heads, *reach))
        self.far = nn.Parameter(torch.zeros(heads))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Mix tokens [B, N, C] that lie row by row on a grid; same shape and dtype out."""
        return self.to_out(self.gather(tokens, grid))

    def gather(self, tokens: Tensor, grid: Grid) -> Tensor:
        """What each head gathers for tokens [B, N, C], side by side: [B, N, h·n]."""
        check_grid(tokens, grid)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            grid = tuple(len(range(side)) for side in grid)  # numbers: a graph for each size
        lines = self._lay_out(grid)
        if torch.compiler.is_compiling():
            return mix_whole(self, tokens, lines)
        chunk = self.large_chunk if tokens.device.type != "cpu" else CHUNK
        call = _Call(self, lines, chunk, _is_recomputed(tokens))
        parts = tokens.split(max(1, chunk // tokens.shape[1]))
        mixed = [self._mix(part, call) for part in parts]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def read_queries(self, tokens: Tensor) -> Tensor:
        """Queries of all heads of tokens [B, n, C], side by side: [B, n, h·r]."""
        return self.to_q(tokens)

    def read_keys(self, tokens: Tensor) -> Tensor:
        """Of each head its keys, then its values: [B, n, C] → [B, n, h·(r + n)].

        It is linear, so that the mean of the keys of some tokens is the key of their mean.
        """
        return self.to_kv(tokens)

    def _lay_out(self, grid: Grid) -> tuple[GridLine, ...]:
        """Blocks, windows and cells along each axis; no cells where the window holds everything."""
        blocks, windows, cells = self.sides
        if not torch.compiler.is_exporting():
            beyond = any(side > window for side, window in zip(grid, windows, strict=True))
            cells = tuple(min(own, side) * beyond for own, side in zip(cells, grid, strict=True))
        return tuple(GridLine(*each) for each in zip(grid, blocks, windows, cells, strict=True))

    def _mix(self, tokens: Tensor, call: _Call) -> Tensor:
        """What each head of some pictures [B, N, C] gathers, side by side: [B, N, h·n]."""
        cells = self.read_keys(pool_cells(tokens, call.lines))
        row = tokens.shape[1] // call.lines[0].side  # its tokens
        mixed, held, low, high = [], cells[:, :0], 0, 0  # the keys of the rows low … high − 1
        for chunk in call.chunks:
            known = held[:, (chunk.start - low) * row :]
            fresh = self.read_keys(tokens[:, max(chunk.start, high) * row : chunk.stop * row])
            keys = torch.cat([known, fresh, cells], dim=1)
            low, high = chunk.start, chunk.stop
            held = keys[:, : (high - low) * row]
            queries = tokens[:, chunk.top * row : chunk.end * row]
            rows = call.find_rows(chunk, tokens.shape[0], cells.shape[1])
            inputs = (queries, keys, call.find_near(chunk), call.find_far(chunk), rows)
            attend = self._attend_fused if call.fused else self._attend
            if call.recompute:
                mixed.append(
                    checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                mixed.append(attend(*inputs))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def _attend(
        self, tokens: Tensor, keys: Tensor, near: Tensor, far: Tensor, rows: Rows
    ) -> Tensor:
        """What the heads of a chunk gather: [B, ·, h·n].

        Args:
            tokens: of the chunk, [B, ·, C].
            keys: keys and values of the rows that it sees, then of the cells, [B, ·, h·(r + n)].
            near: ρ of every pair of a block's queries and keys, [blocks, h, b², w²].
            far: log n of every cell, [blocks, 1, 1, M].
            rows: what each block takes.
        """
        r, n, pictures = self.key_rank, self.value_rank, tokens.shape[0]
        query = self.read_queries(tokens).reshape(-1, r).index_select(0, rows.queries)
        query = query.unflatten(0, (-1, near.shape[2]))  # [B·blocks·h, b², r]
        both = keys.reshape(-1, r + n).index_select(0, rows.keys)
        key, value = both.unflatten(0, (query.shape[0], -1)).split((r, n), dim=2)
        far = (far + self.far[:, None, None]).expand(-1, -1, near.shape[2], -1)
        scores = torch.cat([near, far], dim=3).to(query.dtype)
        scores = scores.expand(pictures, -1, -1, -1, -1).flatten(0, 2)
        scores = torch.baddbmm(scores, query, key.transpose(1, 2))
        weights = scores.softmax(2).to(value.dtype)
        mixed = torch.bmm(value.transpose(1, 2), weights.transpose(1, 2))  # faster than A·V on CPUs
        mixed = self.finish_rows(mixed.transpose(1, 2), scores)
        mixed = mixed.reshape(-1, mixed.shape[2]).index_select(0, rows.results)
        return mixed.view(pictures, tokens.shape[1], -1)

    def finish_rows(self, mixed: Tensor, scores: Tensor) -> Tensor:
        """What goes out of rows […, n] that were gathered by scores […, keys]: here, they alone."""
        return mixed

    def _attend_fused(
        self, tokens: Tensor, keys: Tensor, near: Tensor, far: Tensor, rows: Rows
    ) -> Tensor:
        """The same as `_attend` by PyTorch's fused attention, with `rows` of whole tokens.

        Its kernels want channels in multiples of 8: zeros fill what is missing.
        """
        heads, r, n = self.heads, self.key_rank, self.value_rank
        query = _fill(self.to_q(tokens).flatten(0, 1).unflatten(1, (heads, r)))
        both = keys.flatten(0, 1).unflatten(1, (heads, r + n))
        widths = query.shape[2], n + -n % 8
        if widths != (r, n):
            both = torch.cat([_fill(part) for part in both.split((r, n), dim=2)], dim=2)
        query = query.index_select(0, rows.queries).unflatten(0, (-1, near.shape[2]))
        both = both.index_select(0, rows.keys).unflatten(0, (query.shape[0], -1))
        key, value = both.transpose(1, 2).split(widths, dim=3)
        far = (far + self.far[:, None, None]).expand(-1, heads, near.shape[2], -1)
        bias = torch.cat([near, far], dim=3).to(query.dtype).repeat(tokens.shape[0], 1, 1, 1)
        mixed = scaled_dot_product_attention(query.transpose(1, 2), key, value, bias, scale=1.0)
        mixed = mixed.transpose(1, 2)[..., :n].flatten(0, 1).index_select(0, rows.results)
        return mixed.reshape(tokens.shape[0], tokens.shape[1], -1)

    def init_from(self, attention: Any) -> None:
        """Start from the weights of the attention alone, as if its tokens were white noise."""
        halo_start.set_from_weights(self, attention)

    def start_from(self, attention: Any, sample: Sequence[TokenSample]) -> None:
        """Start from the attention and what it was seen with; see `halo_start`."""
        halo_start.set_from_sample(self, attention, sample)

    def extra_repr(self) -> str:
        return f"block={self.config.block}, window={self.config.window}, cells={self.config.cells}"


def _fill(rows: Tensor) -> Tensor:
    """Rows [·, h, c] with zeros up to the next multiple of 8 channels."""
    return pad(rows, (0, -rows.shape[2] % 8))


def _is_recomputed(tokens: Tensor) -> bool:
    """Whether training computes every chunk again in the backward pass, which bounds its memory."""
    large = tokens.shape[1] > CHUNK and tokens.shape[0] * tokens.shape[1] > RECOMPUTED
    return torch.is_grad_enabled() and large


def _weigh_cells(lines: tuple[GridLine, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """log n of every cell for every block, n its tokens outside of the window: [blocks, M]."""
    outside = count_outside(lines, device)
    counted = outside.clamp(min=1).float().log().to(dtype)  # float16 ends at 65504
    return torch.where(outside > 0, counted, NEVER)


class _Call:
    """What all pictures of one call of a mixer share: chunks, their indices and their biases.

    Args:
        mixer: that is called.
        lines: of the grid.
        tokens: of a chunk.
        recompute: whether chunks are computed again in the backward pass.
    """

    def __init__(
        self, mixer: HaloMixer, lines: tuple[GridLine, ...], tokens: int, recompute: bool
    ) -> None:
        self.mixer, self.lines, self.recompute = mixer, lines, recompute
        self.chunks = list(cut_into_chunks(lines, tokens))
        self.device = mixer.far.device
        seen = prod(line.reach for line in lines) + prod(line.cells for line in lines)
        self.fused = mixer.may_fuse and self.device.type in FUSED and seen >= FUSED_FROM
        blocks, cells = (prod(getattr(line, of) for line in lines) for of in ("blocks", "cells"))
        self.far = recall(blocks * cells, _weigh_cells, lines, self.device, mixer.far.dtype)
        self.near: dict[Any, Tensor] = {}
        self.rows: dict[Any, Rows] = {}

    def find_rows(self, chunk: Chunk, pictures: int, cells: int) -> Rows:
        """The indices of a chunk, made once for all of its kind."""
        key = (chunk.kind, pictures)
        if key not in self.rows:
            heads = 1 if self.fused else self.mixer.heads
            seen = prod(line.blocks * line.reach for line in self.lines) + cells
            entries = pictures * heads * seen
            self.rows[key] = recall(
                entries, Chunk.list_rows, chunk, pictures, heads, cells, self.device
            )
        return self.rows[key]

    def find_near(self, chunk: Chunk) -> Tensor:
        """ρ of every pair of query and key, made once for all of its kind: [blocks, h, b², w²]."""
        if chunk.kind not in self.near:
            entries = prod(line.blocks * line.block * line.reach for line in self.lines)
            offsets = recall(entries, Chunk.list_offsets, chunk, self.device)
            table = self.mixer.relative.flatten(1).index_select(1, offsets.flatten())
            self.near[chunk.kind] = table.unflatten(1, offsets.shape).transpose(0, 1)
        return self.near[chunk.kind]

    def find_far(self, chunk: Chunk) -> Tensor:
        """log n of every cell as a chunk's blocks see it: [blocks, 1, 1, M]."""
        each = self.far.shape[0] // self.lines[0].blocks  # blocks of a row of blocks
        return self.far[chunk.first * each : chunk.last * each, None, None]
