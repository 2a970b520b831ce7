"""Where the blocks, windows and cells of a halo block lie on a grid of tokens: indices alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

NEVER = -1e4  # a score that no softmax sees, in float16 too
KEPT, MOST_KEPT = 64, 2**21  # results that `recall` keeps, and the entries of one at most

Made = TypeVar("Made")


def recall(entries: int, make: Callable[..., Made], *args: Any) -> Made:
    """`make(*args)`, which depends on nothing else, kept for the next call where it is small.

    On a GPU, making the indices of a small grid takes longer than all that they are used for. What
    a mode such as PyTorch's fake tensors or a recorded CUDA graph makes is of no use outside of it.

    Args:
        entries: how many numbers are made.
        make: a function of sizes and a device; no bound method, which equals no other.
        args: its arguments.
    """
    if entries > MOST_KEPT or _get_current_dispatch_mode() is not None or _is_recorded():
        return make(*args)
    return _keep(make, *args)


@lru_cache(maxsize=KEPT)
def _keep(make: Callable[..., Made], *args: Any) -> Made:
    with torch.inference_mode(False):  # else no later training could use it
        return make(*args)


def _is_recorded() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class GridLine:
    """Blocks, windows and cells along one axis of a grid.

    An exported program serves every side: there a window has all its keys, and those beyond a
    shorter side are to be masked.

    Attributes:
        side: tokens along the axis.
        block: queries of a block; the last block may reach beyond the end.
        window: keys of a window.
        cells: parts of equal size, up to one token; at most `side`, but in an exported program,
            where some are empty on a shorter side.
    """

    side: int
    block: int
    window: int
    cells: int

    @property
    def blocks(self) -> int:
        return (self.side + self.block - 1) // self.block  # ONNX rounds towards zero

    @property
    def reach(self) -> int:
        """Keys that a block sees."""
        return self.window if torch.compiler.is_exporting() else min(self.window, self.side)

    @property
    def halo(self) -> int:
        """Keys of a window before the first query of its block."""
        return (self.window - self.block) // 2

    def find_first_key(self, block: int) -> int:
        """The first key of a block: the window moves inwards at the border."""
        return max(0, min(block * self.block - self.halo, self.side - self.reach))

    def list_keys(self, device: torch.device) -> Tensor:
        """Places of the keys of every block: [blocks, reach]."""
        first = torch.arange(self.blocks, device=device) * self.block - self.halo
        first = first.clamp(max=self.side - self.reach).clamp(min=0)
        return first[:, None] + torch.arange(self.reach, device=device)

    def list_queries(self, device: torch.device) -> Tensor:
        """Places of the queries of every block, beyond the end too: [blocks, block]."""
        return torch.arange(self.blocks * self.block, device=device).unflatten(0, (-1, self.block))

    def list_offsets(self, device: torch.device) -> Tensor:
        """Key − query of every pair, counted from the least that ρ knows: [blocks, b, reach]."""
        keys, queries, most = self.list_keys(device), self.list_queries(device), self.window - 1
        return (keys[:, None] - queries[:, :, None]).clamp(-most, most) + most

    def count_cells(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of every cell [cells], and how many the window of every block holds [·, cells]."""
        bounds = torch.arange(self.cells + 1, device=device) * self.side // max(1, self.cells)
        low, high = bounds[:-1], bounds[1:]
        keys = self.list_keys(device)
        last = torch.minimum(keys[:, -1:] + 1, high).clamp(max=self.side)
        return high - low, (last - torch.maximum(keys[:, :1], low)).clamp(min=0)

    def weigh_tokens(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight of each token in the mean of each cell: [cells, side]."""
        place = torch.arange(self.side, device=device)
        bounds = torch.arange(self.cells + 1, device=device) * self.side // self.cells
        inside = (place >= bounds[:-1, None]) & (place < bounds[1:, None])
        return (inside / inside.sum(1, keepdim=True).clamp(min=1)).to(dtype)

    def average_cells(self, maps: Tensor, axis: int) -> Tensor:
        """Means over the cells along an axis of maps: each token is in exactly one."""
        if torch.compiler.is_compiling():  # lengths are symbols: a product with a matrix
            weights = self.weigh_tokens(maps.device, maps.dtype)
            return (maps.movedim(axis, -1) @ weights.T).movedim(-1, axis)
        if maps.device.type not in ("cpu", "meta"):  # one product, where launches take the time
            entries = self.side * self.cells
            weights = recall(entries, GridLine.weigh_tokens, self, maps.device, maps.dtype)
            return (maps.movedim(axis, -1) @ weights.T).movedim(-1, axis)
        ends = [cell * self.side // self.cells for cell in range(self.cells + 1)]
        parts = maps.split([end - start for start, end in pairwise(ends)], axis)
        return torch.stack([part.mean(axis) for part in parts], axis)


def pool_cells(tokens: Tensor, lines: Sequence[GridLine]) -> Tensor:
    """The mean of every cell's tokens: [B, N, C] → [B, M, C]; 0 where a cell is empty."""
    if not all(line.cells for line in lines):
        return tokens[:, :0]
    maps = tokens.unflatten(1, [line.side for line in lines])
    for axis, line in enumerate(lines, 1):
        maps = line.average_cells(maps, axis)
    return maps.flatten(1, len(lines))


def count_outside(lines: Sequence[GridLine], device: torch.device) -> Tensor:
    """How many tokens of every cell lie outside of each block's window: [blocks, M]."""
    counts = [line.count_cells(device) for line in lines]
    sizes, inside = counts[0]
    for more_sizes, more_inside in counts[1:]:
        sizes, inside = torch.kron(sizes, more_sizes), torch.kron(inside, more_inside)
    return sizes - inside


def combine(places: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Places along the axes of a grid as places in its row-by-row order.

    Args:
        places: of each axis, tensors of equally many dimensions [a, b, …].
        sizes: of the axes.

    Returns:
        [Πa, Πb, …]: every combination, the last axis fastest.
    """
    total = places[0]
    for place, size in zip(places[1:], sizes[1:], strict=True):
        one = [part for length in total.shape for part in (length, 1)]
        other = [part for length in place.shape for part in (1, length)]
        shape = [a * b for a, b in zip(total.shape, place.shape, strict=True)]
        total = (total.reshape(one) * size + place.reshape(other)).reshape(shape)
    return total


@dataclass(frozen=True)
class Chunk:
    """Some rows of blocks, and the rows of keys that they see.

    A row is what lies at one place of the first axis: of a video, a frame.

    Attributes:
        lines: of the grid.
        first, last: rows of blocks first … last − 1.
    """

    lines: tuple[GridLine, ...]
    first: int
    last: int

    @property
    def is_whole(self) -> bool:
        return self.last - self.first >= self.lines[0].blocks

    @property
    def top(self) -> int:
        """The first row of queries."""
        return self.first * self.lines[0].block

    @property
    def end(self) -> int:
        """The row after the last one of queries."""
        down = self.lines[0]
        return down.side if self.is_whole else min(self.last * down.block, down.side)

    @cached_property
    def first_keys(self) -> tuple[int, ...]:
        """The first row of keys of each row of blocks."""
        return tuple(self.lines[0].find_first_key(block) for block in range(self.first, self.last))

    @property
    def start(self) -> int:
        """The first row of keys."""
        return 0 if self.is_whole else self.first_keys[0]

    @property
    def stop(self) -> int:
        """The row after the last one of keys."""
        down = self.lines[0]
        return down.side if self.is_whole else self.first_keys[-1] + down.reach

    @property
    def kind(self) -> tuple[int, ...]:
        """Chunks of a kind have their queries, keys and offsets at the same places."""
        if self.is_whole:
            return ()
        return (self.end - self.top, *(key - self.top for key in self.first_keys))

    def list_offsets(self, device: torch.device) -> Tensor:
        """Which entry of ρ each pair of query and key has: [blocks, b², w²]."""
        places = [line.list_offsets(device) for line in self.lines]
        places[0] = places[0][self.first : self.last]
        return combine(places, [2 * line.window - 1 for line in self.lines])

    def list_rows(self, pictures: int, heads: int, cells: int, device: torch.device) -> Rows:
        """Where each block finds its queries and keys, and each token its result."""
        down, *across = self.lines
        height, sides = self.end - self.top, [line.side for line in self.lines]
        area = _product(sides[1:])  # tokens of a row
        own = torch.arange((self.last - self.first) * down.block, device=device)
        queries = [own.clamp(max=height - 1).unflatten(0, (-1, down.block))]
        queries += [line.list_queries(device).clamp(max=line.side - 1) for line in across]
        keys = [line.list_keys(device) for line in self.lines]
        keys[0] = keys[0][self.first : self.last] - self.start
        near, seen = combine(keys, sides), (self.stop - self.start) * area
        far = (seen + torch.arange(cells, device=device)).expand(near.shape[0], -1)
        places = [torch.arange(height, device=device)]
        places += [torch.arange(line.side, device=device) for line in across]
        block = [place // line.block for place, line in zip(places, self.lines, strict=True)]
        within = [place % line.block for place, line in zip(places, self.lines, strict=True)]
        counts = [self.last - self.first, *(line.blocks for line in across)]
        lengths = [line.block for line in self.lines]
        each = _product(lengths)
        picture = torch.arange(pictures, device=device)[:, None, None, None]
        head = torch.arange(heads, device=device)
        query = (picture * height * area + combine(queries, sides)[:, None]) * heads
        key = (picture * (seen + cells) + torch.cat([near, far], dim=1)[:, None]) * heads
        result = picture[:, :, 0] * _product(counts) + combine(block, counts)[:, None]
        result = (result * heads + head) * each + combine(within, lengths)[:, None]
        return Rows(
            (query + head[:, None]).flatten(), (key + head[:, None]).flatten(), result.flatten()
        )


@dataclass(frozen=True)
class Rows:
    """Indices into rows of one head each.

    Attributes:
        queries: in the order [picture, block, head, b²] of rows [picture, token, head].
        keys: in the order [picture, block, head, w² + M] of rows [picture, key or cell, head].
        results: in the order [picture, token, head] of rows [picture, block, head, b²].
    """

    queries: Tensor
    keys: Tensor
    results: Tensor


def _product(numbers: Sequence[int]) -> int:
    total = 1
    for number in numbers:
        total = total * number
    return total


def cut_into_chunks(lines: tuple[GridLine, ...], tokens: int) -> Iterator[Chunk]:
    """Chunks of about so many tokens, one after the other."""
    down = lines[0]
    step = max(1, round(tokens / (down.block * _product([line.side for line in lines[1:]]))))
    for first in range(0, down.blocks, step):
        yield Chunk(lines, first, min(first + step, down.blocks))
