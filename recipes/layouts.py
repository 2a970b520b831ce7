"""How a ΔConvBlock is best worked out on a CPU: layouts and orders of operations, in turn.

`python recipes/layouts.py` times, in turn, the block as it is and other ways to the same output, on
the sites of Stable Diffusion 1.5 at 512×512 pixels, and writes `results/layouts.csv`.

- `block`: as it is. Tokens [B, N, C] are, without a copy, maps in channels-last layout; the mean is
  added in place.
- `mean out of place`: the sum of both branches is a new tensor.
- `mean by a product`: the mean over the tokens is a matrix product with ones.
- `contiguous maps`: the maps are copied into NCHW layout before the convolutions, and back after.
- `projection before upsampling`: each stage goes through its part of the output projection at its
  own scale, where there are fewer tokens, and what is upsampled has C channels instead of C'/2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convfusion.bench.timing import describe_machine, time_interleaved
from convfusion.mixers.delta_conv import DeltaConv, DeltaConvBlock
from convfusion.mixers.tokens import Grid
from convfusion.ops.reference import apply_gate, halve
from pages import write

CASES = ((320, 64, 7), (320, 64, 11), (640, 32, 9), (1280, 16, 5))  # C, side, K
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def mean_apart(block: DeltaConvBlock, tokens: Tensor, grid: Grid) -> Tensor:
    return projected(block, tokens, grid) + mean(block, tokens)


def mean_by_product(block: DeltaConvBlock, tokens: Tensor, grid: Grid) -> Tensor:
    ones = tokens.new_ones(len(tokens), 1, tokens.shape[1])
    return projected(block, tokens, grid).add_(block.mean_proj(ones @ tokens / tokens.shape[1]))


def contiguous_maps(block: DeltaConvBlock, tokens: Tensor, grid: Grid) -> Tensor:
    maps = block.proj_in(tokens).transpose(1, 2).unflatten(2, grid).contiguous()
    mixed = block.apply_pyramid(maps).flatten(2).transpose(1, 2).contiguous()
    return block.proj_out(mixed).add_(mean(block, tokens))


def projected_first(block: DeltaConvBlock, tokens: Tensor, grid: Grid) -> Tensor:
    maps = block.proj_in(tokens).transpose(1, 2).unflatten(2, grid)
    parts = block.proj_out.weight.chunk(len(block.convs), dim=1)
    out = mean(block, tokens) + block.proj_out.bias
    for i, (conv, weight) in enumerate(zip(block.convs, parts, strict=True)):
        maps = halve(maps) if i else maps
        mixed = apply_gate(conv(maps), block.config.gate)
        mixed = F.linear(mixed.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
        if i:
            mixed = F.interpolate(mixed, size=grid, mode="bilinear", align_corners=False)
        out = out + mixed.flatten(2).transpose(1, 2)
    return out


def projected(block: DeltaConvBlock, tokens: Tensor, grid: Grid) -> Tensor:
    maps = block.proj_in(tokens).transpose(1, 2).unflatten(2, grid)
    return block.proj_out(block.apply_pyramid(maps).flatten(2).transpose(1, 2))


def mean(block: DeltaConvBlock, tokens: Tensor) -> Tensor:
    return block.mean_proj(tokens.mean(dim=1, keepdim=True))


WAYS: dict[str, Callable[[DeltaConvBlock, Tensor, Grid], Tensor]] = {
    "block": lambda block, tokens, grid: block(tokens, grid),
    "mean out of place": mean_apart,
    "mean by a product": mean_by_product,
    "contiguous maps": contiguous_maps,
    "projection before upsampling": projected_first,
}


@torch.no_grad()
def case(channels: int, side: int, kernel: int, dtype: torch.dtype, rounds: int) -> list[Any]:
    """A row for every way at one site, after each has given the block's output."""
    torch.manual_seed(0)
    block = DeltaConv(kernel_size=kernel).build(channels).to(dtype)
    tokens, grid = torch.randn(2, side * side, channels, dtype=dtype), (side, side)
    reference = block(tokens, grid).float()
    for name, way in WAYS.items():
        error = ((way(block, tokens, grid).float() - reference).norm() / reference.norm()).item()
        assert error <= TOLERANCES[dtype], f"{name} is off by {error:.1e}"
    calls = {name: (lambda way=way: way(block, tokens, grid)) for name, way in WAYS.items()}
    device = torch.device("cpu")
    found = time_interleaved(calls, device, rounds)
    rows = []
    for name, timing in found.items():
        ratios = [a / b for a, b in zip(timing.seconds, found["block"].seconds, strict=True)]
        ratios.sort()
        rows.append(
            {
                "channels": channels,
                "side": side,
                "kernel_size": kernel,
                "dtype": str(dtype).removeprefix("torch."),
                "way": name,
                "median_ms": round(1e3 * timing.median, 3),
                "over_block": round(ratios[len(ratios) // 2], 3),
                "over_block_low": round(ratios[math.floor(0.25 * (len(ratios) - 1))], 3),
                "over_block_high": round(ratios[math.ceil(0.75 * (len(ratios) - 1))], 3),
                "rounds": rounds,
                **describe_machine(device),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    rows = []
    for dtype in TOLERANCES:
        for channels, side, kernel in CASES:
            rows += case(channels, side, kernel, dtype, args.rounds)
            for row in rows[-len(WAYS) :]:
                print(*list(row.values())[:8], flush=True)
    write("layouts.csv", rows)


if __name__ == "__main__":
    main()
