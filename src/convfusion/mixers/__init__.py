"""Token mixers: everything that can stand where a self-attention stood.

The contract: settings are a frozen dataclass with `build(channels, heads)` for a site of so many
channels and attention heads, which returns a `TokenMixer`.
Register the settings in `MIXERS` and the mixer works with every adapter, checkpoint and trainer.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import Mixer, TokenMixer, check_grid
from convfusion.mixers.delta_conv import DeltaConv, DeltaConvBlock, Gate
from convfusion.mixers.halo import Halo, HaloMixer
from convfusion.mixers.linear import GeneralisedLinear
from convfusion.mixers.local import Circular, Neighbourhood
from convfusion.mixers.plain import Depthwise, MeanOnly, Removed
from convfusion.mixers.reduced import Pooled, ToMe
from convfusion.mixers.shared import Shared
from convfusion.mixers.tokens import Grid
from convfusion.settings import check_names

__all__ = [
    "MIXERS",
    "Circular",
    "DeltaConv",
    "DeltaConvBlock",
    "Depthwise",
    "Gate",
    "GeneralisedLinear",
    "Grid",
    "Halo",
    "HaloMixer",
    "MeanOnly",
    "Mixer",
    "Neighbourhood",
    "Pooled",
    "Removed",
    "Shared",
    "ToMe",
    "TokenMixer",
    "check_grid",
    "mixer_from_dict",
    "mixer_to_dict",
]

MIXERS: dict[str, type] = {
    "delta_conv": DeltaConv,
    "halo": Halo,
    "removed": Removed,
    "mean_only": MeanOnly,
    "neighbourhood": Neighbourhood,
    "circular": Circular,
    "linfusion": GeneralisedLinear,
    "pooled": Pooled,
    "tome": ToMe,
    "depthwise": Depthwise,
    "shared": Shared,
}


def mixer_to_dict(mixer: Any) -> dict[str, Any]:
    """Settings as JSON-ready values, with their registered name under `kind`."""
    kinds = {settings: kind for kind, settings in MIXERS.items()}
    if type(mixer) in kinds:
        values = {f.name: getattr(mixer, f.name) for f in fields(mixer)}
        for name, value in values.items():
            if type(value) in kinds:
                values[name] = mixer_to_dict(value)
        return {"kind": kinds[type(mixer)], **values}
    raise ConvFusionError(f"{type(mixer).__name__} is not a registered mixer: {', '.join(MIXERS)}")


def mixer_from_dict(values: dict[str, Any]) -> Any:
    """The inverse of `mixer_to_dict`; every unknown name is an error."""
    if not isinstance(values, dict) or str(values.get("kind")) not in MIXERS:
        known = ", ".join(MIXERS)
        raise ConvFusionError(f"a mixer needs a kind, one of {known}; got {values!r}")
    settings = MIXERS[values["kind"]]
    options = {key: value for key, value in values.items() if key != "kind"}
    check_names(settings, options, values["kind"])
    for name, value in options.items():
        if isinstance(value, dict):
            options[name] = mixer_from_dict(value)
    return settings(**options)
