"""Random inputs for one call of a denoiser of any family, from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convfusion.adapters import Denoiser, adapter_for

TEXT_TOKENS = {"unet": 77, "pixart": 300}  # CLIP's and PixArt-Σ's T5's


def denoiser_inputs(
    model: Denoiser, latents: tuple[int, int], batch: int, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of one forward pass, on the model's device and in its dtype.

    Args:
        model: a denoiser that an adapter knows.
        latents: (height, width).
        batch: samples.
        seed: of the random numbers.
    """
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        if weight.is_meta:
            return torch.empty(shape, dtype=weight.dtype, device="meta")
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    config, family = model.config, adapter_for(model).family
    name = "sample" if family == "unet" else "hidden_states"
    inputs: dict[str, Any] = {
        name: randn(batch, config.in_channels, *latents),
        "timestep": torch.full((batch,), 500, device=weight.device),
        "return_dict": False,
    }
    if family == "dit":
        return inputs | {"class_labels": torch.zeros(batch, dtype=torch.long, device=weight.device)}
    width = config.caption_channels if family == "pixart" else config.cross_attention_dim
    inputs["encoder_hidden_states"] = randn(batch, TEXT_TOKENS[family], width)
    if family == "pixart":
        sized = {"resolution": randn(batch, 2), "aspect_ratio": randn(batch, 1)}
        none = dict.fromkeys(sized)
        inputs["added_cond_kwargs"] = sized if model.use_additional_conditions else none
    elif config.addition_embed_type == "text_time":
        ids = 6  # original size, crop and target size; the refiner has 5
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": randn(batch, pooled),
            "time_ids": randn(batch, ids),
        }
    return inputs
