"""Made-up inputs of a denoiser, in the shapes that its pipeline would give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convfusion.adapters import Denoiser, adapter_for
from convfusion.errors import ConvFusionError

REFINER_IDS = 5  # numbers that SDXL's refiner is told of its picture
PATCHES = 257  # tokens of a picture from CLIP's ViT-H, which IP-Adapter Plus is given


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
        words: tokens of the text; by default CLIP's 77, the 300 of PixArt-Σ's T5, or the 256 of
            Kolors' ChatGLM.
        device: of the tensors, by default the model's; `meta` gives shapes alone.

    Raises:
        ConvFusionError: the model takes something of a kind that is not known here.
    """
    config, family = model.config, adapter_for(model).family
    device = model.device if device is None else device
    words = words or _usual_words(model)
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
            "encoder_hidden_states": values(
                batch, words, config.caption_channels or config.cross_attention_dim
            ),
            "encoder_attention_mask": torch.ones(batch, words, device=device, dtype=model.dtype),
            "added_cond_kwargs": _pixart_conditions(model, values, batch),
        }
    return inputs | _unet_conditions(model, values, batch, words)


def _usual_words(model: Denoiser) -> int:
    if adapter_for(model).family == "pixart":
        return 300
    return 256 if model.config.get("encoder_hid_dim") else 77


def _unet_conditions(model: Denoiser, values: Any, batch: int, words: int) -> dict[str, Any]:
    """What a UNet takes beside latents and timestep."""
    config, added = model.config, {}
    inputs = {"encoder_hidden_states": values(batch, words, _text_width(model))}
    if config.addition_embed_type == "text_time":
        ids = time_ids(model)
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        added = {"text_embeds": values(batch, pooled), "time_ids": values(batch, ids)}
    elif config.addition_embed_type not in (None, "text"):
        raise _unknown(model, "addition_embed_type", config.addition_embed_type)
    if config.encoder_hid_dim_type == "ip_image_proj":
        layers = model.encoder_hid_proj.image_projection_layers
        added["image_embeds"] = [values(batch, *_picture_shape(layer)) for layer in layers]
    if added:
        inputs["added_cond_kwargs"] = added
    if config.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = values(batch, config.projection_class_embeddings_input_dim)
    elif config.class_embed_type == "identity":
        inputs["class_labels"] = values(batch, model.time_embedding.linear_2.out_features)
    elif config.class_embed_type == "timestep" or config.num_class_embeds is not None:
        device = inputs["encoder_hidden_states"].device
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    elif config.class_embed_type is not None:
        raise _unknown(model, "class_embed_type", config.class_embed_type)
    if config.time_cond_proj_dim is not None:  # the guidance of a latent consistency model
        inputs["timestep_cond"] = values(batch, config.time_cond_proj_dim)
    return inputs


def time_ids(model: Denoiser) -> int:
    """How many numbers an SDXL UNet is told of its picture; 0 for another denoiser.

    They are six (size, crop, wanted size), or the refiner's five, with an aesthetic score in place
    of the wanted size. A refiner's one text encoder has pooled outputs as wide as its tokens.
    """
    config = model.config
    if config.get("addition_embed_type") != "text_time":
        return 0
    pooled = config.projection_class_embeddings_input_dim - 5 * config.addition_time_embed_dim
    refines = config.encoder_hid_dim is None and pooled == config.cross_attention_dim
    return REFINER_IDS if refines else 6


def _text_width(model: Denoiser) -> int:
    """Of the tokens of the text, before any projection in the model."""
    config = model.config
    projection = getattr(model, "text_encoder_hid_proj", None)  # Kolors' beside an IP-Adapter
    if config.encoder_hid_dim_type == "text_proj" or projection is not None:
        return config.encoder_hid_dim
    if config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise _unknown(model, "encoder_hid_dim_type", config.encoder_hid_dim_type)
    widths = config.cross_attention_dim
    if isinstance(widths, int):
        return widths
    if len(set(widths)) > 1:
        raise _unknown(model, "cross_attention_dim", widths)
    return widths[0]


def _picture_shape(layer: nn.Module) -> tuple[int, ...]:
    """Of one picture for the projection of an IP-Adapter, without the batch."""
    kind = type(layer).__name__
    width = next(part.in_features for part in layer.modules() if isinstance(part, nn.Linear))
    if kind in ("ImageProjection", "IPAdapterFaceIDImageProjection"):
        return (1, width)
    if kind in ("IPAdapterPlusImageProjection", "IPAdapterFullImageProjection"):
        return (1, PATCHES, width)
    raise ConvFusionError(f"the inputs of an IP-Adapter with {kind} cannot be made up: unload it")


def _unknown(model: Denoiser, name: str, value: Any) -> ConvFusionError:
    return ConvFusionError(
        f"inputs cannot be made up for a {type(model).__name__} with {name} {value!r}"
    )


def _pixart_conditions(model: Denoiser, values: Any, batch: int) -> dict[str, Tensor | None]:
    if model.use_additional_conditions:  # PixArt-α at 1024 pixels; its config may leave it open
        return {"resolution": values(batch, 2), "aspect_ratio": values(batch, 1)}
    return {"resolution": None, "aspect_ratio": None}
