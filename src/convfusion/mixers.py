"""Token mixers: everything that can stand where a self-attention stood.

The contract: settings are a frozen dataclass with `build(channels, heads)` for a site of so many
channels and attention heads, which returns a `TokenMixer`.
Register the settings in `MIXERS` and the mixer works with every adapter, checkpoint and trainer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from convfusion.block import (
    DeltaConv,
    Grid,
    TokenMixer,
    check_grid,
    set_to_uniform_attention,
)
from convfusion.errors import ConvFusionError
from convfusion.fields import check_fields, check_names
from convfusion.neighbourhood import neighbourhood_attention


class Mixer(Protocol):
    """Settings of a token mixer."""

    def build(self, channels: int, heads: int) -> TokenMixer: ...


@dataclass(frozen=True)
class Removed:
    """No mixing at all: the site adds nothing."""

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return RemovedMixer(self)


@dataclass(frozen=True)
class MeanOnly:
    """Uniform attention: every token receives the same projection of the mean token."""

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return MeanOnlyMixer(channels, self)


@dataclass(frozen=True)
class Neighbourhood:
    """The site's own attention, restricted to the nearest window × window tokens (NATTEN's rule).

    Near the border the window moves inwards, so that every token attends to as many keys. On a
    grid no larger than the window it is the full attention.

    Attributes:
        window: odd side K, in tokens.
    """

    window: int = 13

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window < 1 or self.window % 2 == 0:
            raise ConvFusionError(f"window must be odd and positive, not {self.window}")

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return NeighbourhoodMixer(channels, heads, self)


class RemovedMixer(TokenMixer):
    """Zeros in the shape of the tokens."""

    def __init__(self, config: Removed) -> None:
        super().__init__()
        self.config = config

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        return torch.zeros_like(tokens)


class MeanOnlyMixer(TokenMixer):
    """proj(mean over tokens), at every token."""

    def __init__(self, channels: int, config: MeanOnly) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        return self.proj(tokens.mean(dim=1, keepdim=True)).expand_as(tokens)

    def init_from(self, attention: Any) -> None:
        """Exactly uniform attention: W_o·W_v and W_o·b_v + b_o."""
        set_to_uniform_attention(self.proj, attention)


class NeighbourhoodMixer(TokenMixer):
    """softmax(q·kᵀ/√d)·v over the keys within the window of each query.

    Raises:
        ConvFusionError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, heads: int, config: Neighbourhood) -> None:
        super().__init__()
        if channels % heads:
            raise ConvFusionError(f"{heads} heads do not divide {channels} channels")
        self.config, self.heads = config, heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = neighbourhood_attention(query, key, value, grid, self.config.window)
        return self.to_out(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def init_from(self, attention: Any) -> None:
        """Take over its projections; a missing bias is zero."""
        if attention.heads != self.heads or attention.to_q.weight.shape[0] != len(self.to_q.bias):
            raise ConvFusionError("the attention's heads or inner channels are not the site's")
        own = (self.to_q, self.to_k, self.to_v, self.to_out)
        theirs = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        for mine, stock in zip(own, theirs, strict=True):
            mine.weight.copy_(stock.weight)
            mine.bias.zero_()
            if stock.bias is not None:
                mine.bias.copy_(stock.bias)


MIXERS: dict[str, type] = {
    "delta_conv": DeltaConv,
    "removed": Removed,
    "mean_only": MeanOnly,
    "neighbourhood": Neighbourhood,
}


def mixer_to_dict(mixer: Any) -> dict[str, Any]:
    """Settings as JSON-ready values, with their registered name under `kind`."""
    kinds = {settings: kind for kind, settings in MIXERS.items()}
    if type(mixer) in kinds:
        return {"kind": kinds[type(mixer)], **asdict(mixer)}
    raise ConvFusionError(f"{type(mixer).__name__} is not a registered mixer: {', '.join(MIXERS)}")


def mixer_from_dict(values: dict[str, Any]) -> Any:
    """The inverse of `mixer_to_dict`; every unknown name is an error."""
    if not isinstance(values, dict) or str(values.get("kind")) not in MIXERS:
        known = ", ".join(MIXERS)
        raise ConvFusionError(f"a mixer needs a kind, one of {known}; got {values!r}")
    settings = MIXERS[values["kind"]]
    options = {key: value for key, value in values.items() if key != "kind"}
    check_names(settings, options, values["kind"])
    return settings(**options)
