"""Kernel sizes that are known to work, by name: each family says those of its models."""

from __future__ import annotations

from convfusion.errors import ConvFusionError
from convfusion.families import FAMILIES, Denoiser, family_of
from convfusion.surgery.config import ConvertConfig, with_kernel_sizes


def preset_names() -> list[str]:
    """The names of all presets, in the order of their families."""
    return [name for family in FAMILIES.values() for name in family.presets]


def get_preset(name: str) -> ConvertConfig:
    """The preset of that name.

    Raises:
        ConvFusionError: there is none.
    """
    for family in FAMILIES.values():
        if name in family.presets:
            return with_kernel_sizes(family.presets[name])
    raise ConvFusionError(f"no preset {name!r}; there are {', '.join(preset_names())}")


def choose_preset(model: Denoiser) -> str:
    """The name of the preset whose layout of sites the model has."""
    return family_of(model).preset_for(model)
