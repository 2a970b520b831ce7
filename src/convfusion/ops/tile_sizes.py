"""How the kernels cut their work: by shapes alone, so that every device adds in the same order."""

from __future__ import annotations

from dataclasses import dataclass

CHANNELS = (64, 32, 16)  # that a program may own
PER_THREAD = 2  # values of a tile's column that one thread holds: 4 bytes of half precision
PROGRAMS = 4096  # wanted of the weight gradient: some thirty for each of a large GPU's cores


@dataclass(frozen=True)
class Tile:
    """What one program of a convolution owns; rows and cols are even, for the pooling."""

    rows: int
    cols: int
    channels: int

    @property
    def warps(self) -> int:
        """Warps of 32 threads that share the rows and channels of a tile."""
        return max(1, self.rows * self.channels // (32 * PER_THREAD))


def choose_tile(kernel: int, channels: int) -> Tile:
    """The tile of a convolution of K×K over so many channels.

    The channels fill blocks as wide as wastes least. Eight columns bring the loads per multiply-add
    from 1 down to (8 + K - 1)/(8·K) and still leave the sums and a row of the kernel in registers
    at K = 21; a kernel of 3 has little to reuse. More rows share the halo of a larger kernel.
    """
    rows, cols = (4, 4) if kernel <= 3 else (8, 8)
    return Tile(rows, cols, choose_block(channels))


def choose_block(channels: int) -> int:
    """The block with the fewest channels left over; of equals, the widest."""
    return min(CHANNELS, key=lambda block: (-channels % block, -block))


def choose_chunks(groups: int, kernel: int, blocks: int) -> tuple[int, int]:
    """Chunks of the pixels for the weight gradient, and groups of rows in each.

    Every chunk costs a partial gradient of K·K·C' float32 values, written and read once.
    """
    wanted = -(-PROGRAMS // (kernel * blocks))
    each = -(-groups // min(groups, wanted))
    return -(-groups // each), each
