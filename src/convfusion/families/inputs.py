"""Made-up inputs of a denoiser, in the shapes that its pipeline would give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convfusion.families import Denoiser, adapter_for


def example_inputs(
    model: Denoiser,
    size: tuple[int, int],
    *,
    batch: int = 1,
    words: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of a denoiser, filled with fixed random values.

    Args:
        model: a denoiser of a known family.
        size: (height, width) of the latents.
        batch: samples.
        words: tokens of the text; by default CLIP's 77, or the 300 of PixArt-Σ's T5.
        device: of the tensors, by default the model's; `meta` gives shapes alone.
    """
    config, family = model.config, adapter_for(model).family
    device = model.device if device is None else device
    words = words or (300 if family == "pixart" else 77)
    generator = None if str(device) == "meta" else torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        made = torch.randn(
            *shape, generator=generator, device="meta" if generator is None else None
        )
        return made.to(device, model.dtype)

    maps = values(batch, config.in_channels, *size)
    inputs: dict[str, Any] = {
        "sample" if family == "unet" else "hidden_states": maps,
        "timestep": torch.full((batch,), 500, device=device),
        "return_dict": False,
    }
    if family == "dit":
        return inputs | {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)}
    if family == "pixart":
        return inputs | {
            "encoder_hidden_states": values(batch, words, config.caption_channels),
            "encoder_attention_mask": torch.ones(batch, words, device=device, dtype=model.dtype),
            "added_cond_kwargs": _pixart_conditions(config, values, batch),
        }
    inputs["encoder_hidden_states"] = values(batch, words, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        numbers = 6 * config.addition_time_embed_dim
        pooled = config.projection_class_embeddings_input_dim - numbers
        inputs["added_cond_kwargs"] = {
            "text_embeds": values(batch, pooled),
            "time_ids": values(batch, 6),
        }
    return inputs


def _pixart_conditions(config: Any, values: Any, batch: int) -> dict[str, Tensor | None]:
    if config.use_additional_conditions:  # PixArt-α at 1024 pixels
        return {"resolution": values(batch, 2), "aspect_ratio": values(batch, 1)}
    return {"resolution": None, "aspect_ratio": None}
