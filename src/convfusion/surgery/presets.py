"""Kernel sizes that are known to work: one function per model layout.

Sizes of sd15, sdxl and pixart are those of the paper's reference weights, about 60 % of the
effective receptive field measured at each level. SD2.1 has SD1.5's sites and takes its sizes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, adapter_for, list_sites
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.surgery.config import ConvertConfig, with_kernel_sizes


def sd15() -> ConvertConfig:
    """Stable Diffusion 1.x: 16 sites on four levels."""
    return with_kernel_sizes(
        {
            "down_blocks.0.*": 7,
            "down_blocks.1.*": 9,
            "down_blocks.2.*": 5,
            "mid_block.*": 3,
            "up_blocks.1.*": 5,
            "up_blocks.2.*": 9,
            "up_blocks.3.*": 11,
        }
    )


def sd21() -> ConvertConfig:
    """Stable Diffusion 2.x: the sites of SD1.5, and its kernel sizes."""
    return sd15()


def sdxl() -> ConvertConfig:
    """Stable Diffusion XL base: 70 sites on two levels."""
    return with_kernel_sizes(
        {
            "down_blocks.1.*": 9,
            "down_blocks.2.*": 7,
            "mid_block.*": 9,
            "up_blocks.0.*": 9,
            "up_blocks.1.*": 13,
        }
    )


def pixart() -> ConvertConfig:
    """PixArt-α and PixArt-Σ: 13 at every site."""
    return with_kernel_sizes(13)


def dit() -> ConvertConfig:
    """DiT: as PixArt, whose blocks it shares (the paper has no DiT)."""
    return with_kernel_sizes(13)


def default() -> ConvertConfig:
    """Any other UNet: 7 at every site."""
    return with_kernel_sizes(DeltaConv().kernel_size)


PRESETS: dict[str, Callable[[], ConvertConfig]] = {
    preset.__name__: preset for preset in (sd15, sd21, sdxl, pixart, dit, default)
}

_SD15_LAYOUT = {
    "down_blocks.0": 2,
    "down_blocks.1": 2,
    "down_blocks.2": 2,
    "mid_block": 1,
    "up_blocks.1": 3,
    "up_blocks.2": 3,
    "up_blocks.3": 3,
}
_SDXL_LAYOUT = {
    "down_blocks.1": 4,
    "down_blocks.2": 20,
    "mid_block": 10,
    "up_blocks.0": 30,
    "up_blocks.1": 6,
}


def by_name(name: str) -> ConvertConfig:
    """The preset of that name.

    Raises:
        ConvFusionError: there is none.
    """
    if name not in PRESETS:
        raise ConvFusionError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def preset_for(model: Denoiser) -> str:
    """The name of the preset whose layout of sites the model has, else `default`."""
    family = adapter_for(model).family
    if family in ("pixart", "dit"):
        return family
    places = (re.match(r"(mid_block|\w+_blocks\.\d+)", site.path) for site in list_sites(model))
    layout = Counter(place.group(1) for place in places if place)
    if layout == _SDXL_LAYOUT:
        return "sdxl"
    if layout == _SD15_LAYOUT:
        return "sd21" if model.config.cross_attention_dim == 1024 else "sd15"
    return "default"
