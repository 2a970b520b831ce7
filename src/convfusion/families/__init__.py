"""Model families, a file each: what is particular to one kind of denoiser is said there alone."""

from convfusion.families import controlnet, dit, hunyuan, motion, pixart, sd3, unet, wan
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
    block_family,
    check_captioned,
    component_names,
    count_sequences,
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

for _family in (
    unet.UNET,
    pixart.PIXART,
    dit.DIT,
    wan.WAN,
    motion.MOTION,
    hunyuan.HUNYUAN_DIT,
    sd3.SD3_MEDIUM,
    controlnet.CONTROLNET,  # after the others: what a pipeline with one converts is its denoiser
):
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
    "block_family",
    "check_captioned",
    "component_names",
    "controlnet",
    "count_sequences",
    "denoiser_of",
    "dit",
    "encode_conditioning",
    "example_inputs",
    "family_of",
    "hunyuan",
    "latent_scale",
    "list_sites",
    "motion",
    "native_latents",
    "native_size",
    "noisy_latents",
    "pixart",
    "pixel_unit",
    "pixel_unit_of",
    "register",
    "sd3",
    "shorten_path",
    "site_grid",
    "supported_classes",
    "unet",
    "wan",
]
