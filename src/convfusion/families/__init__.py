"""Model families, a file each: what is particular to one kind of denoiser is said there alone."""

from convfusion.families import dit, pixart, unet, wan
from convfusion.families.base import (
    FAMILIES,
    Denoiser,
    Family,
    Site,
    Size,
    TextReader,
    family_of,
    register,
    supported_classes,
)
from convfusion.families.carrier import Carrier, KeywordCarrier
from convfusion.families.lookup import (
    check_captioned,
    component_names,
    denoiser_of,
    encode_conditioning,
    example_inputs,
    latent_scale,
    list_sites,
    native_latents,
    native_size,
    noisy_latents,
    pixel_unit,
    pixel_unit_of,
    shorten_path,
    site_grid,
)

for _family in (unet.UNET, pixart.PIXART, dit.DIT, wan.WAN):
    register(_family)

__all__ = [
    "FAMILIES",
    "Carrier",
    "Denoiser",
    "Family",
    "KeywordCarrier",
    "Site",
    "Size",
    "TextReader",
    "check_captioned",
    "component_names",
    "denoiser_of",
    "dit",
    "encode_conditioning",
    "example_inputs",
    "family_of",
    "latent_scale",
    "list_sites",
    "native_latents",
    "native_size",
    "noisy_latents",
    "pixart",
    "pixel_unit",
    "pixel_unit_of",
    "register",
    "shorten_path",
    "site_grid",
    "supported_classes",
    "unet",
    "wan",
]
