"""Synthetic files in the layout of the authors' released weights, and a plain form of their block.

Both are written from the description of the layout, and share nothing with
`convfusion.checkpoint.released`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convfusion.families import list_sites

GATES = {
    "reference": lambda first, second: first * second * math.sqrt(first.shape[-1]),
    "sigmoid": lambda first, second: first / (1 + (-second).exp()),
}


def release(
    model, kernel=3, stages=2, ratio=0.5, seed=0, group="", bias=False
) -> dict[str, Tensor]:
    """Tensors as they are named in a released file, for every self-attention of a model.

    `kernel` is one side, or a function of the block's path that tells it. With `bias` the
    depthwise kernels have one, as in the first two states of the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in list_sites(model):
        block, _, _ = site.path.rpartition(".attn1")
        side = kernel if isinstance(kernel, int) else kernel(block)
        width, inner = site.channels, int(site.channels * ratio)
        shapes = {
            "conv_up.weight": (inner, width),
            "conv_up.bias": (inner,),
            "conv_out.weight": (width, inner // 2 * stages),
            "conv_out.bias": (width,),
            "conv_pool.weight": (width, width),
            "conv_pool.bias": (width,),
        }
        shapes |= {f"gates.{i}.conv_spatial.weight": (side, side, inner) for i in range(stages)}
        if bias:
            shapes |= {f"gates.{i}.conv_spatial.bias": (inner,) for i in range(stages)}
        for name, shape in shapes.items():
            tensors[f"{group}{block}.conv1.{name}"] = 0.3 * torch.randn(shape, generator=generator)
    return tensors


def reference_block(weights: dict[str, Tensor], tokens: Tensor, grid, gate: str) -> Tensor:
    """The authors' block on tokens [B, N, C], channels last and pixel by pixel, in float64.

    Args:
        weights: by their names after `.conv1.`.
        tokens: row by row on the grid.
        grid: (H, W).
        gate: `reference` or `sigmoid`.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    maps = tokens.double().unflatten(1, grid)
    inner = maps @ weights["conv_up.weight"].T + weights["conv_up.bias"]
    stages = []
    for i in range(sum(name.endswith("conv_spatial.weight") for name in weights)):
        size = (math.floor(grid[0] * 0.5**i), math.floor(grid[1] * 0.5**i))
        mixed = depthwise(pool(inner, size), weights[f"gates.{i}.conv_spatial.weight"])
        mixed = mixed + weights.get(f"gates.{i}.conv_spatial.bias", 0.0)
        half = mixed.shape[-1] // 2
        stages.append(upsample(GATES[gate](mixed[..., :half], mixed[..., half:]), grid))
    out = torch.cat(stages, dim=-1) @ weights["conv_out.weight"].T + weights["conv_out.bias"]
    mean = maps.mean(dim=(1, 2), keepdim=True)
    out = out + mean @ weights["conv_pool.weight"].T + weights["conv_pool.bias"]
    return out.flatten(1, 2).to(tokens.dtype)


def pool(maps: Tensor, size) -> Tensor:
    """Adaptive means of maps [B, H, W, C]: window i runs from ⌊i·H/h⌋ to ⌈(i+1)·H/h⌉."""
    for axis, wanted in zip((1, 2), size, strict=True):
        side = maps.shape[axis]
        parts = []
        for i in range(wanted):
            start, stop = i * side // wanted, -(-(i + 1) * side // wanted)
            parts.append(maps.narrow(axis, start, stop - start).mean(dim=axis, keepdim=True))
        maps = torch.cat(parts, dim=axis)
    return maps


def depthwise(maps: Tensor, kernel: Tensor) -> Tensor:
    """Σ kernel[i, j, c] · maps[y + i − K//2, x + j − K//2, c], zero outside."""
    half = kernel.shape[0] // 2
    padded = torch.zeros(
        maps.shape[0], maps.shape[1] + 2 * half, maps.shape[2] + 2 * half, maps.shape[3]
    ).to(maps)
    padded[:, half : half + maps.shape[1], half : half + maps.shape[2]] = maps
    out = torch.zeros_like(maps)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            out += kernel[i, j] * padded[:, i : i + maps.shape[1], j : j + maps.shape[2]]
    return out


def upsample(maps: Tensor, grid) -> Tensor:
    """Bilinear on pixel centres: pixel y reads at (y + 1/2)·h/H − 1/2, held at the border."""
    for axis, wanted in zip((1, 2), grid, strict=True):
        side = maps.shape[axis]
        places = ((torch.arange(wanted).double() + 0.5) * side / wanted - 0.5).clamp(min=0)
        low = places.floor().long()
        high = (low + 1).clamp(max=side - 1)
        part = (places - low).view([-1 if axis == a else 1 for a in range(4)])
        maps = maps.index_select(axis, low) * (1 - part) + maps.index_select(axis, high) * part
    return maps
