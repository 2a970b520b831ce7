"""Token mixers: everything that can stand where a self-attention stood.

The contract: settings are a frozen dataclass with `build(channels)`, which returns a `TokenMixer`.
Register the settings in `MIXERS` and the mixer works with every adapter, checkpoint and trainer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, get_type_hints

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


class Mixer(Protocol):
    """Settings of a token mixer."""

    def build(self, channels: int) -> TokenMixer: ...


@dataclass(frozen=True)
class Removed:
    """No mixing at all: the site adds nothing."""

    def build(self, channels: int) -> TokenMixer:
        return RemovedMixer(self)


@dataclass(frozen=True)
class MeanOnly:
    """Uniform attention: every token receives the same projection of the mean token."""

    def build(self, channels: int) -> TokenMixer:
        return MeanOnlyMixer(channels, self)


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


MIXERS: dict[str, type] = {"delta_conv": DeltaConv, "removed": Removed, "mean_only": MeanOnly}


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
    types = get_type_hints(settings)
    for key, value in options.items():
        if key not in types:
            raise ConvFusionError(f"{values['kind']} has no setting {key!r}: {', '.join(types)}")
        _check_type(key, value, types[key])
    return settings(**options)


def _check_type(key: str, value: Any, declared: Any) -> None:
    if declared is float and type(value) is int:
        return
    wanted = declared if isinstance(declared, type) else str  # a Literal's values are words
    if type(value) is not wanted:
        raise ConvFusionError(f"{key} must be {wanted.__name__}, not {value!r}")
