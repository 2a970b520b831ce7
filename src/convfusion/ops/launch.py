"""The kernels in order: the pyramid and its gradients, on contiguous tensors of one device."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from convfusion.ops import kernels
from convfusion.ops.reference import gate_scale, pooled_sides
from convfusion.ops.tile_sizes import choose_block, choose_chunks, choose_tile

Grid = tuple[int, int]
PIXELS, WARPS = 32, 4  # of the kernels that resize


def forward(tokens: Tensor, weights: Tensor, grid: Grid, gate: str) -> Tensor:
    """The pyramid of tokens [B, N, C'] with weights [n, K·K, C']: [B, N, n·C'/2]."""
    batch, pixels, channels = tokens.shape
    half = channels // 2
    sides = pooled_sides(grid, len(weights))
    out = tokens.new_empty(batch, pixels, half * len(weights))
    if not out.numel():
        return out
    inputs = _allocate_stages(tokens, sides)
    with torch.cuda.device_of(tokens):
        for i, side in enumerate(sides):
            mixed = tokens.new_empty(batch, side[0] * side[1], half) if i else out
            _launch_over_tiles(
                kernels.conv_gate, weights[i], side, half,
                inputs[i], weights[i], mixed, inputs[i + 1], _get_scale(channels, gate), *side,
                OUT_STRIDE=mixed.shape[-1], SIGMOID=gate == "sigmoid",
                POOL=inputs[i + 1] is not None,
            )  # fmt: skip
            if i:
                _upsample(mixed, out, side, grid, i * half)
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
    if not tokens.numel():
        return torch.empty_like(tokens), torch.zeros_like(weights[: None if weight_grad else 0])
    inputs, before = _allocate_stages(tokens, sides), []
    flows: list[Any] = [*map(torch.empty_like, inputs[:-1]), None]
    with torch.cuda.device_of(tokens):
        for i, side in enumerate(sides):
            own = grad if i == 0 else _upsample_grad(grad, inputs[i], side, grid, i)
            before.append(_compute_gate_grad(own, inputs[i], inputs[i + 1], weights[i], side, gate))
        for i in reversed(range(len(sides))):
            _launch_over_tiles(
                kernels.conv_input_grad, weights[i], sides[i], tokens.shape[-1],
                before[i], weights[i], flows[i + 1], flows[i], *sides[i],
                COARSE=flows[i + 1] is not None,
            )  # fmt: skip
        if not weight_grad:
            return flows[0], weights.new_empty(0)
        parts = zip(inputs[:-1], before, sides, strict=True)
        grads = [_compute_weight_grad(x, flow, weights, side) for x, flow, side in parts]
    return flows[0], torch.stack(grads)


def _compute_gate_grad(
    grad: Tensor, x: Tensor, coarser: Tensor | None, weights: Tensor, side: Grid, gate: str
) -> Tensor:
    """Gradient before the gate of one stage [B, N_i, C']; fills `coarser` on the way."""
    out = torch.empty_like(x)
    _launch_over_tiles(
        kernels.conv_gate_grad, weights, side, x.shape[-1] // 2,
        x, weights, grad, out, coarser, _get_scale(x.shape[-1], gate), *side,
        GRAD_STRIDE=grad.shape[-1], SIGMOID=gate == "sigmoid", POOL=coarser is not None,
    )  # fmt: skip
    return out


def _compute_weight_grad(x: Tensor, grad: Tensor, weights: Tensor, side: Grid) -> Tensor:
    """Gradient of one stage's weights [K·K, C'], its partial sums added in a fixed order."""
    batch, _, channels = x.shape
    kernel = _get_kernel_side(weights[0])
    tile = choose_tile(kernel, channels)
    groups, blocks = batch * triton.cdiv(side[0], tile.rows), triton.cdiv(channels, tile.channels)
    chunks, each = choose_chunks(groups, kernel, blocks)
    partial = x.new_empty(chunks, kernel * kernel, channels, dtype=torch.float32)
    kernels.conv_weight_grad[(chunks, blocks, kernel)](
        x, grad, partial, groups, each, *side, C=channels, KERNEL=kernel,
        ROWS=tile.rows, COLS=tile.cols, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
    return partial.sum(0).to(weights.dtype)


def _launch_over_tiles(
    kernel: Any, weights: Tensor, side: Grid, channels: int, *args: Any, **constants: Any
) -> None:
    """Launch a convolution with a program for every tile of a map and block of `channels`."""
    size, (batch, _, stride) = _get_kernel_side(weights), args[0].shape
    tile = choose_tile(size, channels)
    tiles = batch * triton.cdiv(side[0], tile.rows) * triton.cdiv(side[1], tile.cols)
    kernel[(tiles, triton.cdiv(channels, tile.channels))](
        *args, C=stride, KERNEL=size, ROWS=tile.rows, COLS=tile.cols, CHANNELS=tile.channels,
        num_warps=tile.warps, **constants,
    )  # fmt: skip


def _upsample(small: Tensor, out: Tensor, side: Grid, grid: Grid, start: int) -> None:
    """Write a stage [B, N_i, C], of a grid `side`, into channels start… of `out` [B, N, …]."""
    channels = small.shape[-1]
    block = choose_block(channels)
    blocks = len(small) * triton.cdiv(grid[0] * grid[1], PIXELS)
    kernels.upsample[(blocks, triton.cdiv(channels, block))](
        small, out, *side, *grid, side[0] / grid[0], side[1] / grid[1],
        OUT_STRIDE=out.shape[-1], OUT_START=start, C=channels,
        PIXELS=PIXELS, CHANNELS=block, num_warps=WARPS,
    )  # fmt: skip


def _upsample_grad(grad: Tensor, x: Tensor, side: Grid, grid: Grid, stage: int) -> Tensor:
    """The transpose of `_upsample`, of one stage's slice of `grad`: [B, N_i, C'/2]."""
    channels = x.shape[-1] // 2
    small = x.new_empty(*x.shape[:2], channels)
    block = choose_block(channels)
    blocks = len(small) * triton.cdiv(side[0] * side[1], PIXELS)
    # A pixel is part of the targets in an open interval of two of its own widths.
    reach = [-(-2 * large // few) + 2 for few, large in zip(side, grid, strict=True)]
    kernels.upsample_grad[(blocks, triton.cdiv(channels, block))](
        grad, small, *side, *grid, side[0] / grid[0], side[1] / grid[1], *reach,
        GRAD_STRIDE=grad.shape[-1], GRAD_START=stage * channels, C=channels,
        PIXELS=PIXELS, CHANNELS=block, num_warps=WARPS,
    )  # fmt: skip
    return small


def _allocate_stages(tokens: Tensor, sides: list[Grid]) -> list[Any]:
    """The input of every stage, [B, N_i, C'], still empty but for the first; and None."""
    batch, _, channels = tokens.shape
    rooms = [tokens.new_empty(batch, height * width, channels) for height, width in sides[1:]]
    return [tokens, *rooms, None]


def _get_kernel_side(weights: Tensor) -> int:
    """K of weights [K·K, C']."""
    return round(len(weights) ** 0.5)


def _get_scale(channels: int, gate: str) -> float:
    return 1.0 if gate == "sigmoid" else gate_scale(channels, gate)
