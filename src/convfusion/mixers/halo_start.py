"""Start a halo block from the attention that it replaces: two weighted SVDs, and no gradient.

For each head, with second moments Σ over a sample of the tokens that the attention was seen with:

1. Scores. Softmax does not see what all keys have in common, so Σ_k is taken about the mean key of
   each picture. With Σ_q^½·Σ_k^½ = U·S·Vᵀ and s the attention's scale,

       W_q' = (s·S_r)^½·U_rᵀ·Σ_q^−½·W_q,   W_k' = (s·S_r)^½·V_rᵀ·Σ_k^−½·W_k

   give the scores of rank r that are nearest to s·q·k over the sample.
2. Values. Σ_a is the covariance of what the head gathers, a = softmax(s·q·k)·v. The leading left
   singular vectors U_n of W_o·Σ_a^½ write, U_nᵀ·W_o·W_v reads, and what the cut takes from the mean
   of a goes to the bias.
3. ρ(Δ) is the mean over all pairs at the offset Δ of the score that the cut has left out; λ = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import (
    Grid,
    TokenSample,
    output_heads,
    project_heads,
    projections,
    score_scale,
    spans_heads,
)
from convfusion.mixers.offsets import QUERIES, choose_queries, split_queries

if TYPE_CHECKING:
    from convfusion.mixers.halo import HaloMixer

NOTHING = 1e-6  # of the largest eigenvalue: what lies below it is rounding


@dataclass(frozen=True)
class HeadMoments:
    """What the start knows of each head, in float32.

    Attributes:
        query: E[q·qᵀ], [h, d, d].
        key: E[k·kᵀ] about the mean key of each picture, [h, d, d].
        gathered: covariance of a = softmax(s·q·k)·v, [h, d, d].
        mean: E[a], [h, d].
    """

    query: Tensor
    key: Tensor
    gathered: Tensor
    mean: Tensor


@torch.no_grad()
def measure_moments(attention: Any, sample: Sequence[TokenSample]) -> HeadMoments:
    """The moments of a sample; each picture's softmax is worked out for at most 256 queries."""
    query_sum: Any = 0
    key_sum: Any = 0
    squares: Any = 0
    total: Any = 0
    tokens_seen = queries_seen = 0
    for tokens, _ in sample:
        query, key, value = project_heads(attention, tokens)
        key = key - key.mean(2, keepdim=True)
        query_sum += torch.einsum("bhnd,bhne->hde", query, query)
        key_sum += torch.einsum("bhnd,bhne->hde", key, key)
        tokens_seen += query.shape[0] * query.shape[2]
        chosen = choose_queries(query.shape[2], QUERIES).to(query.device)
        for part in split_queries(chosen, query.shape[0] * query.shape[1], query.shape[2]):
            scores = query[:, :, part] @ key.transpose(2, 3) * score_scale(attention)
            gathered = scores.softmax(-1) @ value
            squares += torch.einsum("bhnd,bhne->hde", gathered, gathered)
            total += gathered.sum((0, 2))
            queries_seen += gathered.shape[0] * gathered.shape[2]
    mean = total / queries_seen
    covariance = squares / queries_seen - mean[:, :, None] * mean[:, None, :]
    return HeadMoments(query_sum / tokens_seen, key_sum / tokens_seen, covariance, mean)


def cut_scores(moments: HeadMoments, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """Readers R_q and R_k [h, r, d] with (R_q·q)·(R_k·k) nearest to scale·q·k."""
    root_q, inverse_q = take_roots(moments.query)
    root_k, inverse_k = take_roots(moments.key)
    left, strength, right = torch.linalg.svd(root_q @ root_k)
    size = (strength[:, None, :rank] * scale).sqrt()
    read_q = inverse_q @ left[:, :, :rank] * size
    read_k = inverse_k @ right.transpose(1, 2)[:, :, :rank] * size
    return read_q.transpose(1, 2), read_k.transpose(1, 2)


def cut_values(moments: HeadMoments, out: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A reader [h, n, d] and a writer [h, C, n] whose product is nearest to W_o [h, C, d]."""
    root, _ = take_roots(moments.gathered)
    write = torch.linalg.svd(out @ root, full_matrices=False)[0][:, :, :rank]
    read = write.transpose(1, 2) @ out
    size = read.norm(dim=2).clamp(min=1e-8).sqrt()  # both factors of one size
    return read / size[..., None], write * size[:, None]


@torch.no_grad()
def set_from_weights(mixer: HaloMixer, attention: Any) -> None:
    """Set a block by the attention's weights alone: moments as of white noise, and no ρ.

    Norms of queries and keys are taken as the constants that they are for such noise, and a rotary
    embedding is left out.

    Raises:
        ConvFusionError: the attention's heads or channels are not the block's.
    """
    _check_shape(mixer, attention)
    query, key, value = (
        layer.weight.float().unflatten(0, (attention.heads, -1)) for layer in fold_norms(attention)
    )
    bias = projections(attention)[2].bias
    mean = value.new_zeros(value.shape[:2])
    if bias is not None:
        mean = bias.float().unflatten(0, (attention.heads, -1))
    squares = [each @ each.transpose(1, 2) for each in (query, key, value)]
    _set_projections(mixer, attention, HeadMoments(squares[0], squares[1], squares[2], mean))
    mixer.relative.zero_()


@torch.no_grad()
def set_from_sample(mixer: HaloMixer, attention: Any, sample: Sequence[TokenSample]) -> None:
    """Set a block by the moments of a sample; see the module's equations.

    Raises:
        ConvFusionError: the attention's heads or channels are not the block's, or it normalises
            its queries or keys, which no linear layer can.
    """
    _check_shape(mixer, attention)
    norms = (getattr(attention, name, None) for name in ("norm_q", "norm_k"))
    if any(norm is not None for norm in norms):
        raise ConvFusionError(
            "a halo block cannot start from an attention that normalises its queries and keys: "
            'convert without measuring, or distil with start = "converted"'
        )
    moments = measure_moments(attention, sample)
    read_q, read_k = _set_projections(mixer, attention, moments)
    eye = torch.eye(read_q.shape[2], device=read_q.device)
    left_out = score_scale(attention) * eye - read_q.transpose(1, 2) @ read_k  # [h, d, d]
    reach = [window - 1 for window in mixer.config.sides("window")]
    sums = counts = torch.zeros((), device=read_q.device)
    for tokens, grid in sample:
        query, key, _ = project_heads(attention, tokens)
        key = key - key.mean(2, keepdim=True)
        more = sum_by_offset(query @ left_out, key, grid, reach)
        sums, counts = sums + more[0], counts + more[1]
    mixer.relative.copy_((sums / counts.clamp(min=1)).unflatten(1, mixer.relative.shape[1:]))


def sum_by_offset(
    query: Tensor, key: Tensor, grid: Grid, reach: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sums of q·k over the pairs at each offset of a key from its query, and their numbers.

    Args:
        query, key: [B, h, N, d], row by row on the grid.
        grid: (H, W) or (T, H, W).
        reach: the largest offset along each axis.

    Returns:
        [h, D] and [D]; the offsets lie row by row from −reach to +reach, D = Π(2·reach + 1).
    """
    device, sides = query.device, [2 * most + 1 for most in reach]
    lines = [torch.arange(side, device=device) for side in grid]
    inside = [(line - line[:, None]).abs() <= most for line, most in zip(lines, reach, strict=True)]
    offsets = [
        (line - line[:, None]).clamp(-most, most) + most
        for line, most in zip(lines, reach, strict=True)
    ]
    length = 1
    for side in sides:
        length *= side
    sums = query.new_zeros(query.shape[1], length + 1)
    counts = query.new_zeros(length + 1)
    chosen = choose_queries(query.shape[2], QUERIES).to(device)
    for part in split_queries(chosen, query.shape[0] * query.shape[1], query.shape[2]):
        place, near = _take_rows(offsets, sides, grid, part), _take_rows(inside, None, grid, part)
        place = torch.where(near, place, length).flatten()  # the last one is thrown away
        scores = (query[:, :, part] @ key.transpose(2, 3)).sum(0).flatten(1)
        sums.index_add_(1, place, scores)
        counts += torch.bincount(place, minlength=length + 1) * query.shape[0]
    return sums[:, :-1], counts[:-1]


def _take_rows(
    lines: Sequence[Tensor], sizes: Sequence[int] | None, grid: Grid, queries: Tensor
) -> Tensor:
    """What some queries have of every key, [Q, N], put together from what holds along each axis."""
    parts, rest = [], queries
    for line, side in zip(reversed(lines), reversed(grid), strict=True):
        parts.append(line[rest % side])  # [Q, side]
        rest = rest // side
    parts.reverse()
    total = parts[0]
    for axis, part in enumerate(parts[1:], 1):
        if sizes is None:
            total = (total[:, :, None] & part[:, None]).flatten(1)
        else:
            total = (total[:, :, None] * sizes[axis] + part[:, None]).flatten(1)
    return total


def _check_shape(mixer: HaloMixer, attention: Any) -> None:
    value = projections(attention)[2]
    if attention.heads != mixer.heads:
        raise ConvFusionError("the attention's heads are not the site's")
    if value.weight.shape[0] != mixer.to_out.out_features:
        raise ConvFusionError("the attention's inner channels are not the site's")


def _set_projections(
    mixer: HaloMixer, attention: Any, moments: HeadMoments
) -> tuple[Tensor, Tensor]:
    """Set all layers of a block; returns the readers of its scores, [h, r, d] each."""
    query, key, value = fold_norms(attention)
    out, weights = projections(attention)[3], output_heads(attention)
    read_q, read_k = cut_scores(moments, score_scale(attention), mixer.key_rank)
    read_v, write = cut_values(moments, weights, mixer.value_rank)
    _read(mixer.to_q, [(query, read_q)])
    _read(mixer.to_kv, [(key, read_k), (value, read_v)])
    mixer.to_out.weight.copy_(write.transpose(0, 1).flatten(1))
    kept = torch.einsum("hcn,hnd->hcd", write, read_v)
    bias = torch.einsum("hcd,hd->c", weights - kept, moments.mean)
    mixer.to_out.bias.copy_(bias if out.bias is None else bias + out.bias.float())
    mixer.far.zero_()
    return read_q, read_k


class Projection(NamedTuple):
    """Weight and bias of a linear layer, in float32."""

    weight: Tensor
    bias: Tensor | None


def fold_norms(attention: Any) -> tuple[Projection, Projection, Projection]:
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


def _read(layer: nn.Linear, parts: Sequence[tuple[Any, Tensor]]) -> None:
    """Set a layer to what readers [h, r, d] take of other layers; head by head, in their order."""
    weights, biases = [], []
    for source, reader in parts:
        heads = reader.shape[0]
        weights.append(reader @ source.weight.float().unflatten(0, (heads, -1)))  # [h, r, C]
        bias = reader.new_zeros(reader.shape[:2])
        if source.bias is not None:
            own = source.bias.float().unflatten(0, (heads, -1))
            bias = torch.einsum("hrd,hd->hr", reader, own)
        biases.append(bias)
    layer.weight.copy_(torch.cat(weights, dim=1).flatten(0, 1))
    layer.bias.copy_(torch.cat(biases, dim=1).flatten())


def take_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a second moment [h, d, d], and the inverse of that root."""
    values, basis = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    kept = values > values.amax(-1, keepdim=True) * NOTHING + 1e-20
    inverse = torch.where(kept, values.clamp(min=1e-30).rsqrt(), 0.0)
    across = basis.transpose(1, 2)
    return (basis * values.sqrt()[:, None]) @ across, (basis * inverse[:, None]) @ across
