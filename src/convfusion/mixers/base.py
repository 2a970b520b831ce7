"""The contract of token mixers, and what those share that keep the attention's projections.

Settings are a frozen dataclass with `build(channels, heads)` for a site of so many channels and
attention heads, which returns a `TokenMixer`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from convfusion.errors import ConvFusionError
from convfusion.mixers.tokens import Grid, Heads, TokenSample


class TokenMixer(nn.Module):
    """What stands in place of a self-attention: the contract of `convfusion.mixers`.

    Attributes:
        config: the settings that it was built from.
        ranks: of the grids that it works on: 2 for (H, W), 3 for (T, H, W).
        has_measured_start: whether `start_from` sets it.
        starts_near: whether it draws nearly as the attention as soon as it is built.
    """

    config: Any
    ranks: tuple[int, ...] = (2,)
    has_measured_start: ClassVar[bool] = False
    starts_near: ClassVar[bool] = False

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Mix tokens [B, N, C] that lie row by row on a grid; same shape and dtype out."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def init_from(self, attention: Any) -> None:
        """Start from the diffusers `Attention` that is replaced; by default, do nothing."""

    def start_from(self, attention: Any, sample: Sequence[TokenSample]) -> None:
        """Start from the attention that is replaced, and from tokens that it was seen with.

        Args:
            attention: as for `init_from`.
            sample: some of its tokens, in whole grids.
        """
        raise TypeError(f"{type(self).__name__} has no measured start")


class Mixer(Protocol):
    """Settings of a token mixer."""

    def build(self, channels: int, heads: int) -> TokenMixer: ...


def build_mixer(settings: Mixer, channels: int, heads: int, joint: bool) -> TokenMixer:
    """The mixer of some settings.

    Args:
        settings: of it.
        channels, heads: of the attention that it replaces.
        joint: whether text and image share that attention.

    Raises:
        ConvFusionError: they do, and the mixer knows nothing of a text.
    """
    if not joint:
        return settings.build(channels, heads)
    build = getattr(settings, "build_joint", None)
    if build is None:
        raise ConvFusionError(
            f"text and image share this attention, and {type(settings).__name__} knows nothing of "
            "a text: choose Halo, DeltaConv, MeanOnly, Depthwise or Removed"
        )
    mixer: TokenMixer = build(channels, heads)
    return mixer


class ProjectedMixer(TokenMixer):
    """A mixer with projections `to_q`, `to_k`, `to_v`, `to_out` of its own, split into heads.

    Args:
        channels: C of the tokens.
        heads: h; each head works on d = C/h channels.
        config: the settings that it is built from.

    Raises:
        ConvFusionError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, heads: int, config: Any) -> None:
        super().__init__()
        if channels % heads:
            raise ConvFusionError(f"{heads} heads do not divide {channels} channels")
        self.config, self.heads = config, heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def split(self, tokens: Tensor) -> Tensor:
        """[B, N, C] → [B, h, N, d]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, h, N, d] of tokens [B, N, C]."""
        return (
            self.split(self.to_q(tokens)),
            self.split(self.to_k(tokens)),
            self.split(self.to_v(tokens)),
        )

    def join(self, mixed: Tensor) -> Tensor:
        """The heads [B, h, N, d] side by side, through the output projection: [B, N, C]."""
        return self.to_out(mixed.transpose(1, 2).flatten(2))

    def init_from(self, attention: Any) -> None:
        """Take over the projections of a diffusers `Attention`; a missing bias is zero."""
        if attention.heads != self.heads:
            raise ConvFusionError("the attention's heads are not the site's")
        own = (self.to_q, self.to_k, self.to_v, self.to_out)
        for mine, stock in zip(own, projections(attention), strict=True):
            take_over(mine, stock)


@torch.no_grad()
def take_over(mine: nn.Linear, stock: nn.Linear) -> None:
    """Copy a layer of the same shape; a missing bias is zero."""
    if mine.weight.shape != stock.weight.shape:
        raise ConvFusionError("the attention's inner channels are not the site's")
    mine.weight.copy_(stock.weight)
    mine.bias.zero_()
    if stock.bias is not None:
        mine.bias.copy_(stock.bias)


def projections(attention: Any) -> tuple[Any, Any, Any, Any]:
    """The layers for queries, keys, values and output as they are now, wrapped by a LoRA or not.

    Norms of queries and keys and rotary embeddings are none of them.
    """
    if hasattr(attention, "to_query"):  # as in Kandinsky 5
        names = ("to_query", "to_key", "to_value", "out_layer")
        query, key, value, out = (getattr(attention, name) for name in names)
        return query, key, value, out
    return attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]


def read_gates(attention: Any, tokens: Tensor) -> Tensor | None:
    """What LTX-2 multiplies each head's output with at every token, 2·σ(w·x + b), in float32.

    Args:
        attention: a diffusers attention.
        tokens: x, [B, N, C] of any device and dtype.

    Returns:
        [B, h, N]; None where an attention has no gates.
    """
    gates = getattr(attention, "to_gate_logits", None)
    if gates is None:
        return None
    placed = tokens.to(gates.weight.device, torch.float32)
    logits = F.linear(placed, gates.weight.float(), gates.bias.float())
    return 2 * logits.sigmoid().transpose(1, 2)


@torch.no_grad()
def fold_gates(attention: Any, sample: Sequence[TokenSample] = ()) -> Any:
    """An attention without gates, for a mixer to start from; itself where it has none.

    The mean of its gates over a sample goes into the output projection, or without a sample those
    of a token of zeros. So a start leaves out how gates differ between tokens; see `read_gates`.
    """
    gates = getattr(attention, "to_gate_logits", None)
    if gates is None:
        return attention
    out = copy.deepcopy(attention.to_out[0])
    seen = [each.tokens for each in sample] or [gates.weight.new_zeros(1, 1, gates.in_features)]
    read: Any = [read_gates(attention, tokens) for tokens in seen]
    mean = torch.stack([each.mean((0, 2)) for each in read]).mean(0)  # [h]
    scale = mean.repeat_interleave(out.in_features // attention.heads)
    out.weight.copy_(out.weight.float() * scale)
    plain = copy.copy(attention)
    plain._modules = {**attention._modules, "to_out": nn.ModuleList([out]), "to_gate_logits": None}
    return plain


def as_plain(attention: Any) -> Any:
    """An attention with its parts under the names of diffusers' own `Attention`.

    Most have them already, and are returned as they are; of others it is a view of the same layers.
    """
    if not hasattr(attention, "to_query"):  # as in Kandinsky 5
        return attention
    query, key, value, out = projections(attention)
    return SimpleNamespace(
        to_q=query,
        to_k=key,
        to_v=value,
        to_out=[out],
        heads=attention.num_heads,
        norm_q=attention.query_norm,
        norm_k=attention.key_norm,
    )


def read_maps(attention: Any, maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] as tokens [B, H·W, C], normed where an attention does so first."""
    flat = maps.flatten(2)
    norm = getattr(attention, "group_norm", None)
    return (flat if norm is None else norm(flat)).transpose(1, 2)


def read_added(attention: Any, maps: Tensor, output: Tensor) -> Tensor:
    """What an attention adds to maps [B, C, H, W] to give its output; tokens [B, H·W, C]."""
    added = output * attention.rescale_output_factor - maps
    return added.flatten(2).transpose(1, 2)


def score_scale(attention: Any) -> float:
    """What an attention multiplies q·k with; 1/√d unless it says otherwise."""
    own = getattr(attention, "scale", None)
    if own is not None:
        return own
    return (projections(attention)[0].out_features / as_plain(attention).heads) ** -0.5


def project_heads(attention: Any, given: TokenSample) -> Heads:
    """Queries, keys and values of an attention in float32, of the image's where a text shares it.

    Norms of queries and keys are applied, of each head or across all of them.

    Args:
        attention: a diffusers attention.
        given: what it was seen with, on any device and in any dtype.
    """
    if given.joint is not None:
        device = projections(attention)[2].weight.device
        return Heads(*(each.to(device, torch.float32) for each in given.joint.image))
    query, key, value = normed_heads(attention, given.tokens)
    if given.turn is None:
        return Heads(query, key, value)
    return Heads(given.turn(query), given.turn(key), value)


def normed_heads(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `project_heads`, before a rotary embedding turns queries and keys."""
    attention, found = as_plain(attention), []
    layers = zip(projections(attention)[:3], ("norm_q", "norm_k", ""), strict=True)
    for layer, norm in layers:
        bias = None if layer.bias is None else layer.bias.float()
        mapped = F.linear(tokens.to(layer.weight.device, torch.float32), layer.weight.float(), bias)
        normalise = getattr(attention, norm, None) if norm else None
        if normalise is not None and spans_heads(normalise, attention):
            mapped, normalise = _normalise(normalise, mapped), None
        heads = mapped.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        found.append(heads if normalise is None else _normalise(normalise, heads))
    return found[0], found[1], found[2]


def _normalise(norm: nn.Module, mapped: Tensor) -> Tensor:
    """A norm in float32, whatever the dtype of its weights."""
    weights = {name: weight.float() for name, weight in norm.named_parameters()}
    return functional_call(norm, weights, (mapped,))


def spans_heads(norm: Any, attention: Any) -> bool:
    """Whether a norm of queries or keys is taken over the channels of all heads together."""
    shape = getattr(norm, "normalized_shape", None) or norm.dim  # as PyTorch and diffusers call it
    return math.prod(shape) == projections(attention)[0].out_features


def output_heads(attention: Any) -> Tensor:
    """W_o of each head in float32: [h, C, d]."""
    weight = projections(attention)[3].weight.float()
    return weight.unflatten(1, (as_plain(attention).heads, -1)).transpose(0, 1)


def check_grid(tokens: Tensor, grid: Grid) -> Grid:
    """Return the grid if as many tokens [B, N, C] are there as it has places.

    Raises:
        ConvFusionError: N is another number; both are named.
    """
    places = 1
    for side in grid:
        places *= side
    if tokens.shape[1] != places:
        shape = "×".join(str(side) for side in grid)
        raise ConvFusionError(
            f"there are N = {tokens.shape[1]} tokens, but the grid {shape} has {places}"
        )
    return grid
