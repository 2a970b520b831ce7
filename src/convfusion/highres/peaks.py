"""What a forward pass will hold at its worst moment, told from shapes before it runs.

What counts is what `convfusion.operations` counts: every tensor while something refers to
it, without weights, and without what a library holds inside of one operation.
"""

from __future__ import annotations

from typing import Any

import torch

from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of, example_inputs, family_of
from convfusion.operations import peak_bytes
from convfusion.shapes import copy_to_meta

GIB = 2**30


def estimate_denoiser_peak(pipe_or_model: Any, size: tuple[int, int], *, batch: int = 2) -> float:
    """The peak of a denoiser's activations in GiB.

    Args:
        pipe_or_model: a pipeline or denoiser, converted or not.
        size: (height, width) of the latents.
        batch: samples at once; guidance draws each twice.

    Raises:
        ConvFusionError: the model is quantised, or takes inputs that cannot be made up.
    """
    model = denoiser_of(pipe_or_model)
    if getattr(model, "is_quantized", False):
        raise ConvFusionError(
            "memory cannot be estimated for a quantised model: leave the bound on memory out"
        )
    shapes = copy_to_meta(model, model.dtype)
    inputs = example_inputs(shapes, size, batch=batch, device="meta")
    maps = inputs.pop(family_of(shapes).latents)
    return peak_bytes(shapes, maps, **inputs) / GIB


def estimate_decoder_peak(vae: Any, size: tuple[int, int]) -> float:
    """The peak in GiB of decoding latents of (height, width) in one piece."""
    dtype = torch.float32 if vae.config.get("force_upcast") else vae.dtype  # as `upcast_vae` has it
    if getattr(vae, "decoder", None) is None:
        raise ConvFusionError(
            f"memory cannot be estimated for a {type(vae).__name__}: leave the bound on memory out"
        )
    decoder = copy_to_meta(vae.decoder, dtype).to(dtype)
    latents = torch.empty(1, vae.config.latent_channels, *size, device="meta", dtype=dtype)
    return peak_bytes(decoder, latents) / GIB
