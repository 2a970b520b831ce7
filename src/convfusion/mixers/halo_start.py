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

Where the attention norms its queries and keys, which no linear layer does, q and k are the linear
maps of x that are nearest to the normed ones (`fit_norms`). Where a rotary embedding R turns them,
a linear layer cannot either, since R depends on the place: the score q_i·R_iᵀ·R_j·k_j is cut to
rank r as q·D·k with D = E[R_iᵀ·R_j] over the keys of the window (`average_turn`), which keeps the
channels that turn slowly; and what depends on the offset alone goes to ρ, which is measured against
the scores as the attention has them. λ is then the mean of ρ, in the exponent, over what lies
outside of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import output_heads, project_heads, projections, score_scale
from convfusion.mixers.nearest_layers import (
    Layers,
    average_turns,
    fit_norms,
    fold_norms,
    take_roots,
)
from convfusion.mixers.offsets import QUERIES, choose_queries, split_queries, sum_by_offset
from convfusion.mixers.tokens import TokenSample

if TYPE_CHECKING:
    from convfusion.mixers.halo import HaloMixer


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
def measure_moments(attention: Any, sample: Sequence[TokenSample], layers: Layers) -> HeadMoments:
    """The moments of a sample; each picture's softmax is worked out for at most 256 queries.

    Args:
        attention: a diffusers attention.
        sample: what it was seen with.
        layers: for its queries, keys and values, without norms; see `fit_norms`.
    """
    query_sum: Any = 0
    key_sum: Any = 0
    squares: Any = 0
    total: Any = 0
    tokens_seen = queries_seen = 0
    for each in sample:
        query, key = (layer.split(each.tokens, attention.heads) for layer in layers[:2])
        key = key - key.mean(2, keepdim=True)
        query_sum += torch.einsum("bhnd,bhne->hde", query, query)
        key_sum += torch.einsum("bhnd,bhne->hde", key, key)
        tokens_seen += query.shape[0] * query.shape[2]
        query, key, value = project_heads(attention, each)
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


def cut_scores(
    moments: HeadMoments, scale: float, rank: int, turned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Readers R_q and R_k [h, r, d] with (R_q·q)·(R_k·k) nearest to scale·q·k, or to scale·q·D·k.

    Args:
        moments: of queries and keys.
        scale: of the scores.
        rank: r.
        turned: D, [h, d, d]; see `average_turn`.
    """
    root_q, inverse_q = take_roots(moments.query)
    root_k, inverse_k = take_roots(moments.key)
    product = root_q @ root_k if turned is None else root_q @ turned @ root_k
    left, strength, right = torch.linalg.svd(product)
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
    moments = HeadMoments(squares[0], squares[1], squares[2], mean)
    _set_projections(mixer, attention, moments, fold_norms(attention))
    mixer.relative.zero_()


@torch.no_grad()
def set_from_sample(mixer: HaloMixer, attention: Any, sample: Sequence[TokenSample]) -> None:
    """Set a block by the moments of a sample; see the module's equations.

    Raises:
        ConvFusionError: the attention's heads or channels are not the block's.
    """
    _check_shape(mixer, attention)
    layers, window = fit_norms(attention, sample), mixer.config.sides("window")
    moments = measure_moments(attention, sample, layers)
    turned = average_turns(sample, window, moments.query)
    read_q, read_k = _set_projections(mixer, attention, moments, layers, turned)
    scale = score_scale(attention)
    sums = counts = torch.zeros((), device=read_q.device)
    for each in sample:
        query, key, _ = project_heads(attention, each)
        own_query, own_key = (layer.split(each.tokens, attention.heads) for layer in layers[:2])
        query = torch.cat([query * scale, -own_query @ read_q.transpose(1, 2)], dim=3)
        own_key = (own_key - own_key.mean(2, keepdim=True)) @ read_k.transpose(1, 2)
        if each.turn is None:  # else what keys have in common tells where they are
            key = key - key.mean(2, keepdim=True)
        key = torch.cat([key, own_key], dim=3)
        more = sum_by_offset(query, key, each.grid, [side - 1 for side in window])
        sums, counts = sums + more[0], counts + more[1]
    means = sums / counts.clamp(min=1)
    mixer.relative.copy_(means[:, :-1].unflatten(1, mixer.relative.shape[1:]))
    if turned is not None:
        mixer.far.copy_(_find_far(means, counts, window))


def _find_far(means: Tensor, counts: Tensor, window: Sequence[int]) -> Tensor:
    """λ of each head: log E[exp ρ(Δ)] over the pairs that are no neighbours, [h].

    Args:
        means: ρ by offset and, last, of all that are farther apart, [h, D + 1].
        counts: pairs, [D + 1].
        window: its side along each axis.
    """
    near = torch.ones((), dtype=torch.bool, device=counts.device)
    for side in window:
        away = torch.arange(1 - side, side, device=counts.device).abs()
        near = near[..., None] & (away <= side // 2)
    apart = counts * ~torch.cat([near.flatten(), near.new_zeros(1)])
    if not apart.any():
        return torch.zeros_like(means[:, 0])
    return (means + (apart / apart.sum()).log()).logsumexp(1)


def _check_shape(mixer: HaloMixer, attention: Any) -> None:
    value = projections(attention)[2]
    if attention.heads != mixer.heads:
        raise ConvFusionError("the attention's heads are not the site's")
    if value.weight.shape[0] != mixer.to_out.out_features:
        raise ConvFusionError("the attention's inner channels are not the site's")


def _set_projections(
    mixer: HaloMixer,
    attention: Any,
    moments: HeadMoments,
    layers: Layers,
    turned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Set all layers of a block; returns the readers of its scores, [h, r, d] each."""
    query, key, value = layers
    out, weights = projections(attention)[3], output_heads(attention)
    read_q, read_k = cut_scores(moments, score_scale(attention), mixer.key_rank, turned)
    read_v, write = cut_values(moments, weights, mixer.value_rank)
    _read(mixer.to_q, [(query, read_q)])
    _read(mixer.to_kv, [(key, read_k), (value, read_v)])
    mixer.to_out.weight.copy_(write.transpose(0, 1).flatten(1))
    kept = torch.einsum("hcn,hnd->hcd", write, read_v)
    bias = torch.einsum("hcd,hd->c", weights - kept, moments.mean)
    mixer.to_out.bias.copy_(bias if out.bias is None else bias + out.bias.float())
    mixer.far.zero_()
    return read_q, read_k


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
