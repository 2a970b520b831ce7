"""Conversions by name: kernel sizes that each family says of its models, and halo blocks."""

from __future__ import annotations

from typing import cast

from convfusion.errors import ConvFusionError
from convfusion.families import FAMILIES, Denoiser, family_of
from convfusion.mixers import DeltaConv, Halo, Mixer
from convfusion.surgery.config import ConvertConfig, uniform


def preset_names() -> list[str]:
    """The names of all presets: those of the families in their order, then `halo`."""
    return [*(name for family in FAMILIES.values() for name in family.presets), "halo"]


def get_preset(name: str, model: Denoiser | None = None) -> ConvertConfig:
    """The preset of that name.

    Args:
        name: of the preset.
        model: that it is for; `halo` has blocks for grids of its rank, and without one for
            pictures.

    Raises:
        ConvFusionError: there is none.
    """
    if name == "halo":
        return uniform(Halo() if model is None else family_of(model).halo)
    for family in FAMILIES.values():
        if name in family.presets:
            made = family.presets[name]
            sites = {p: DeltaConv(kernel_size=m) if type(m) is int else m for p, m in made.items()}
            return ConvertConfig(sites=cast(dict[str, Mixer], sites))
    raise ConvFusionError(f"no preset {name!r}; there are {', '.join(preset_names())}")


def choose_preset(model: Denoiser) -> str:
    """The name of the preset whose layout of sites the model has."""
    return family_of(model).preset_for(model)
