"""Conversions by name: kernel sizes that each family says of its models, and halo blocks."""

from __future__ import annotations

from convfusion.errors import ConvFusionError
from convfusion.families import FAMILIES, Denoiser, family_of
from convfusion.mixers import Halo
from convfusion.surgery.config import ConvertConfig, uniform, with_kernel_sizes


def preset_names() -> list[str]:
    """The names of all presets: those of the families in their order, then `halo`."""
    return [*(name for family in FAMILIES.values() for name in family.presets), "halo"]


def get_preset(name: str) -> ConvertConfig:
    """The preset of that name.

    Raises:
        ConvFusionError: there is none.
    """
    if name == "halo":
        return uniform(Halo())
    for family in FAMILIES.values():
        if name in family.presets:
            return with_kernel_sizes(family.presets[name])
    raise ConvFusionError(f"no preset {name!r}; there are {', '.join(preset_names())}")


def choose_preset(model: Denoiser) -> str:
    """The name of the preset whose layout of sites the model has."""
    return family_of(model).preset_for(model)
