"""Linear layers that stand for what an attention does with norms and rotary embeddings.

A block of low rank has plain linear layers for its queries and keys. Where the attention norms
them, and turns them by where they lie, these are the layers that come nearest over a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convfusion.mixers.base import normed_heads, projections, spans_heads
from convfusion.mixers.offsets import choose_queries, take_rows
from convfusion.mixers.tokens import Grid, TokenSample, Turn

TURNED = 32  # queries that the turns around are averaged over
NOTHING = 1e-6  # of the largest eigenvalue: what lies below it is rounding


class Projection(NamedTuple):
    """Weight and bias of a linear layer, in float32."""

    weight: Tensor
    bias: Tensor | None

    def split(self, tokens: Tensor, heads: int) -> Tensor:
        """What it maps tokens [B, N, C] to, by head: [B, h, N, d]."""
        mapped = F.linear(tokens.to(self.weight), self.weight, self.bias)
        return mapped.unflatten(-1, (heads, -1)).transpose(1, 2)


Layers = tuple[Projection, Projection, Projection]  # for queries, keys and values


def fold_norms(attention: Any) -> Layers:
    """Layers for queries, keys and values whose norms are constants: those of white noise."""
    folded = []
    for layer, name in zip(projections(attention)[:3], ("norm_q", "norm_k", ""), strict=True):
        weight, bias = layer.weight.float(), layer.bias
        bias = None if bias is None else bias.float()
        if (norm := getattr(attention, name, None) if name else None) is not None:
            heads = 1 if spans_heads(norm, attention) else attention.heads
            squares = weight.square().sum(1) + (0 if bias is None else bias.square())
            size = squares.unflatten(0, (heads, -1)).mean(1, keepdim=True).rsqrt()
            gain = weight.new_ones(()) if norm.weight is None else norm.weight.float()
            factor = (size * gain).expand(heads, len(weight) // heads).flatten()
            weight = weight * factor[:, None]
            bias = None if bias is None else bias * factor
        folded.append(Projection(weight, bias))
    return folded[0], folded[1], folded[2]


def fit_norms(attention: Any, sample: Sequence[TokenSample]) -> Layers:
    """Layers for queries, keys and values that are nearest to what their norms make of a sample.

    With u = W·x of a head and y what its norm makes of it, the layer gives A·u + E[y] − A·E[u],
    with A = Cov(y, u)·Cov(u, u)⁻¹: for a root mean square, nearly a constant of each channel.
    """
    query, key, value = (_as_projection(layer) for layer in projections(attention)[:3])
    if not any(getattr(attention, name, None) is not None for name in ("norm_q", "norm_k")):
        return query, key, value
    normed = (_fit_norm(attention, sample, layer, i) for i, layer in enumerate((query, key)))
    return next(normed), next(normed), value


def _fit_norm(
    attention: Any, sample: Sequence[TokenSample], layer: Projection, place: int
) -> Projection:
    """The layer of queries (place 0) or keys (1) with what is nearest to its norm."""
    squares: Any = 0
    cross: Any = 0
    given: Any = 0
    wanted: Any = 0
    count = 0
    for each in sample:
        mapped = layer.split(each.tokens, attention.heads)
        normed = normed_heads(attention, each.tokens)[place]
        squares += torch.einsum("bhnd,bhne->hde", mapped, mapped)
        cross += torch.einsum("bhnd,bhne->hde", normed, mapped)
        given, wanted = given + mapped.sum((0, 2)), wanted + normed.sum((0, 2))
        count += mapped.shape[0] * mapped.shape[2]
    mean, normed_mean = given / count, wanted / count
    _, inverse = take_roots(squares / count - mean[:, :, None] * mean[:, None])
    nearest = (cross / count - normed_mean[:, :, None] * mean[:, None]) @ inverse @ inverse
    own = torch.zeros_like(mean) if layer.bias is None else layer.bias.view(mean.shape)
    bias = normed_mean + torch.einsum("hde,he->hd", nearest, own - mean)
    weight = nearest @ layer.weight.unflatten(0, mean.shape)
    return Projection(weight.flatten(0, 1), bias.flatten())


def average_turns(
    sample: Sequence[TokenSample], window: Sequence[int], like: Tensor
) -> Tensor | None:
    """D = E[R_iᵀ·R_j] of the rotary embeddings of a sample, [h, d, d]; None where it has none."""
    seen = {id(each.turn): (each.turn, each.grid) for each in sample}
    heads, size = like.shape[:2]
    found = [
        average_turn(turn, grid, tuple(window), heads, size, like.device)
        for turn, grid in seen.values()
        if turn is not None
    ]
    return torch.stack(found).mean(0) if found else None


@lru_cache(maxsize=4)  # all sites of a model have the same, and it takes a while
def average_turn(
    turn: Turn, grid: Grid, window: tuple[int, ...], heads: int, size: int, device: torch.device
) -> Tensor:
    """D = E[R_iᵀ·R_j] over some queries i and the keys j at most half a window from them.

    Args:
        turn: the rotary embedding R.
        grid: of the tokens.
        window: its side along each axis.
        heads: h.
        size: d, channels of a head.
        device: to work on.

    Returns:
        [h, d, d] in float32.
    """
    lines = [torch.arange(side, device=device) for side in grid]
    inside = [
        (line - line[:, None]).abs() <= side // 2 for line, side in zip(lines, window, strict=True)
    ]
    chosen = choose_queries(math.prod(grid), TURNED).to(device)
    near = take_rows(inside, None, grid, chosen).float()
    near = near / near.sum(1, keepdim=True)
    own, around = [], []
    for direction in torch.eye(size, device=device):  # what one takes fits in memory
        turned = turn(direction.expand(1, heads, math.prod(grid), size))[0]  # [h, N, d]
        own.append(turned[:, chosen])
        around.append(near @ turned)
    return torch.einsum("ahqd,bhqd->hab", torch.stack(own), torch.stack(around)) / len(chosen)


def _as_projection(layer: Any) -> Projection:
    return Projection(layer.weight.float(), None if layer.bias is None else layer.bias.float())


def take_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a second moment [h, d, d], and the inverse of that root."""
    values, basis = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    kept = values > values.amax(-1, keepdim=True) * NOTHING + 1e-20
    inverse = torch.where(kept, values.clamp(min=1e-30).rsqrt(), 0.0)
    across = basis.transpose(1, 2)
    return (basis * values.sqrt()[:, None]) @ across, (basis * inverse[:, None]) @ across
