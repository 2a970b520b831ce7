"""What a forward pass will hold at its worst moment, told from shapes before it runs.

What counts is what `convfusion.bench.activations` counts: every tensor while something refers to
it, without weights, and without what a library holds inside of one operation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from convfusion.bench.activations import peak_bytes
from convfusion.families import denoiser_of, example_inputs, family_of

GIB = 2**30


def denoiser_peak(pipe_or_model: Any, size: tuple[int, int], *, batch: int = 2) -> float:
    """The peak of a denoiser's activations in GiB.

    Args:
        pipe_or_model: a pipeline or denoiser, converted or not.
        size: (height, width) of the latents.
        batch: samples at once; guidance draws each twice.
    """
    shapes = on_meta(denoiser_of(pipe_or_model))
    inputs = example_inputs(shapes, size, batch=batch, device="meta")
    maps = inputs.pop(family_of(shapes).latents)
    return peak_bytes(shapes, maps, **inputs) / GIB


def decoder_peak(vae: Any, size: tuple[int, int]) -> float:
    """The peak in GiB of decoding latents of (height, width) in one piece."""
    dtype = torch.float32 if vae.config.get("force_upcast") else vae.dtype  # as `upcast_vae` has it
    decoder = on_meta(vae.decoder).to(dtype)
    latents = torch.empty(1, vae.config.latent_channels, *size, device="meta", dtype=dtype)
    return peak_bytes(decoder, latents) / GIB


def on_meta(model: nn.Module) -> Any:
    """A copy of a model without values; hooks and settings are kept."""
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    shapes |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, shapes)
