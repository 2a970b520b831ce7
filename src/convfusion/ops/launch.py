"""The kernels in order: the pyramid and its gradients, on contiguous tensors of one device."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from convfusion.ops import kernels
from convfusion.ops.reference import factor, pooled_sides
from convfusion.ops.tiles import block_for, chunks_for, tile_for

Grid = tuple[int, int]
PIXELS, WARPS = 32, 4  # of the kernels that resize


def forward(tokens: Tensor, weights: Tensor, grid: Grid, gate: str) -> Tensor:
    """The pyramid of tokens [B, N, C'] with weights [n, K·K, C']: [B, N, n·C'/2]."""
    batch, pixels, channels = tokens.shape
    half = channels // 2
    sides = pooled_sides(grid, len(weights))
    out = tokens.new_empty(batch, pixels, half * len(weights))
    with torch.cuda.device_of(tokens):
        pooled = tokens
        for i, side in enumerate(sides):
            small = tokens.new_empty(batch, side[0] * side[1], half) if i else out
            coarser = _coarser(pooled, sides, i)
            _over_tiles(
                kernels.conv_gate, weights[i], side, half,
                pooled, weights[i], small, coarser, _scale(channels, gate), *side,
                OUT_STRIDE=small.shape[-1], OUT_START=0, SIGMOID=gate == "sigmoid",
                POOL=coarser is not None,
            )  # fmt: skip
            if i:
                _upsample(small, out, side, grid, i * half)
            pooled = coarser
    return out


def backward(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor,
    grid: Grid,
    gate: str,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [B, N, C'] and weights [n, K·K, C'] from grad [B, N, n·C'/2].

    Without `weight_grad` the second is empty. From the finest stage to the coarsest, the gradients
    before the gates, and on the way the pooled maps again; then back to the finest, those of the
    stages' inputs.
    """
    sides = pooled_sides(grid, len(weights))
    inputs, before = [tokens], []
    with torch.cuda.device_of(tokens):
        for i in range(len(sides)):
            coarser = _coarser(inputs[i], sides, i)
            before.append(_gate_grad(grad, inputs[i], coarser, weights[i], grid, sides[i], i, gate))
            if coarser is not None:
                inputs.append(coarser)
        flow: Tensor | None = None
        for i in reversed(range(len(sides))):
            out = torch.empty_like(inputs[i])
            _over_tiles(
                kernels.conv_input_grad, weights[i], sides[i], tokens.shape[-1],
                before[i], weights[i], flow, out, *sides[i], COARSE=flow is not None,
            )  # fmt: skip
            flow = out
        if not weight_grad:
            return flow, weights.new_empty(0)
        parts = zip(inputs, before, sides, strict=True)
        grads = [_weight_grad(x, given, weights, side) for x, given, side in parts]
    return flow, torch.stack(grads)


def _gate_grad(
    grad: Tensor,
    x: Tensor,
    coarser: Tensor | None,
    weights: Tensor,
    grid: Grid,
    side: Grid,
    stage: int,
    gate: str,
) -> Tensor:
    """Gradient before the gate of one stage [B, N_i, C']; fills `coarser` on the way."""
    half = x.shape[-1] // 2
    if stage:
        small = x.new_empty(*x.shape[:2], half)
        _upsample_grad(grad, small, side, grid, stage * half)
        grad = small
    out = torch.empty_like(x)
    _over_tiles(
        kernels.conv_gate_grad, weights, side, half,
        x, weights, grad, out, coarser, _scale(x.shape[-1], gate), *side,
        GRAD_STRIDE=grad.shape[-1], SIGMOID=gate == "sigmoid", POOL=coarser is not None,
    )  # fmt: skip
    return out


def _weight_grad(x: Tensor, grad: Tensor, weights: Tensor, side: Grid) -> Tensor:
    """Gradient of one stage's weights [K·K, C'], its partial sums added in a fixed order."""
    batch, _, channels = x.shape
    kernel = _side_of(weights[0])
    tile = tile_for(kernel, channels)
    groups, blocks = batch * triton.cdiv(side[0], tile.rows), triton.cdiv(channels, tile.channels)
    chunks, each = chunks_for(groups, kernel, blocks)
    partial = x.new_empty(chunks, kernel * kernel, channels, dtype=torch.float32)
    kernels.conv_weight_grad[(chunks, blocks, kernel)](
        x, grad, partial, groups, each, *side, C=channels, KERNEL=kernel,
        ROWS=tile.rows, COLS=tile.cols, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
    return partial.sum(0).to(weights.dtype)


def _over_tiles(
    kernel: Any, weights: Tensor, side: Grid, channels: int, *args: Any, **constants: Any
) -> None:
    """Launch a convolution with a program for every tile of a map and block of `channels`."""
    size, (batch, _, stride) = _side_of(weights), args[0].shape
    tile = tile_for(size, channels)
    tiles = batch * triton.cdiv(side[0], tile.rows) * triton.cdiv(side[1], tile.cols)
    kernel[(tiles, triton.cdiv(channels, tile.channels))](
        *args, C=stride, KERNEL=size, ROWS=tile.rows, COLS=tile.cols, CHANNELS=tile.channels,
        num_warps=tile.warps, **constants,
    )  # fmt: skip


def _upsample(small: Tensor, out: Tensor, side: Grid, grid: Grid, start: int) -> None:
    """Write a stage [B, N_i, C], of a grid `side`, into channels start… of `out` [B, N, …]."""
    channels = small.shape[-1]
    block = block_for(channels)
    blocks = len(small) * triton.cdiv(grid[0] * grid[1], PIXELS)
    kernels.upsample[(blocks, triton.cdiv(channels, block))](
        small, out, *side, *grid, side[0] / grid[0], side[1] / grid[1],
        OUT_STRIDE=out.shape[-1], OUT_START=start, C=channels,
        PIXELS=PIXELS, CHANNELS=block, num_warps=WARPS,
    )  # fmt: skip


def _upsample_grad(grad: Tensor, small: Tensor, side: Grid, grid: Grid, start: int) -> None:
    """The transpose of `_upsample`: write `small` from channels start… of `grad`."""
    channels = small.shape[-1]
    block = block_for(channels)
    blocks = len(small) * triton.cdiv(side[0] * side[1], PIXELS)
    # A pixel is part of the targets in an open interval of two of its own widths.
    reach = [-(-2 * large // few) + 2 for few, large in zip(side, grid, strict=True)]
    kernels.upsample_grad[(blocks, triton.cdiv(channels, block))](
        grad, small, *side, *grid, side[0] / grid[0], side[1] / grid[1], *reach,
        GRAD_STRIDE=grad.shape[-1], GRAD_START=start, C=channels,
        PIXELS=PIXELS, CHANNELS=block, num_warps=WARPS,
    )  # fmt: skip


def _coarser(x: Tensor, sides: list[Grid], stage: int) -> Tensor | None:
    """Room for the next stage's input, if there is one."""
    if stage + 1 == len(sides):
        return None
    height, width = sides[stage + 1]
    return x.new_empty(len(x), height * width, x.shape[-1])


def _side_of(weights: Tensor) -> int:
    """K of weights [K·K, C']."""
    return round(len(weights) ** 0.5)


def _scale(channels: int, gate: str) -> float:
    return 1.0 if gate == "sigmoid" else factor(channels, gate)
