"""What a denoiser is told beside latents and timestep, from prompts, for each kind of pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convfusion.adapters import Denoiser, adapter_for, denoiser_of
from convfusion.errors import ConvFusionError
from convfusion.inputs import REFINER_IDS, time_ids

AESTHETIC_SCORE = 6.0  # that diffusers tells SDXL's refiner unless it is told another


@torch.no_grad()
def encode_conditioning(pipe: Any, prompts: list[str], size: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments of the denoiser for a batch of prompts, without guidance.

    Args:
        pipe: a Stable Diffusion (1, 2, XL), PixArt or DiT pipeline.
        prompts: one per sample; class names or numbers for DiT.
        size: (height, width) of the pictures in pixels (SDXL is told).

    Raises:
        ConvFusionError: the denoiser is told of more than that; see `check_captioned`.
    """
    check_captioned(pipe)
    family = adapter_for(denoiser_of(pipe)).family
    if family == "unet":
        return _stable_diffusion(pipe, prompts, size)
    return _pixart(pipe, prompts) if family == "pixart" else _dit(pipe, prompts)


def check_captioned(pipe: Any) -> None:
    """Raise a ConvFusionError if a denoiser needs more than latents, a timestep and a caption.

    Such models can be converted and drawn with. Their training and measurement need more than
    pictures with captions.
    """
    model, kind = denoiser_of(pipe), type(pipe).__name__
    config, vae = model.config, getattr(pipe, "vae", None)
    latents = vae.config.get("latent_channels") if vae is not None else None
    more = ""
    if latents not in (None, config.in_channels):
        more = f"{config.in_channels} channels, and its latents have {latents}: a picture or mask"
    elif getattr(config, "encoder_hid_dim_type", None) not in (None, "text_proj"):
        more = "pictures for an IP-Adapter"
    elif config.get("addition_embed_type") not in (None, "text", "text_time"):
        more = "an embedding of a picture"
    elif config.get("class_embed_type") or config.get("num_class_embeds"):
        more = "class labels"
    elif config.get("time_cond_proj_dim"):
        more = "the scale of its guidance, as latent consistency models do"
    if more:
        raise ConvFusionError(
            f"the denoiser of this {kind} takes {more}, beside a caption. It can be converted, and "
            "drawn with in Python; caches, distillation and evaluation know captions only"
        )


def _stable_diffusion(pipe: Any, prompts: list[str], size: tuple[int, int]) -> dict[str, Any]:
    device = pipe.unet.device
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if pipe.unet.config.addition_embed_type != "text_time":
        return {"encoder_hidden_states": pipe.encode_prompt(prompts, device, **options)[0]}
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, **options)
    if pipe.config.force_zeros_for_empty_prompt:  # as SDXL draws where no negative prompt is given
        given = torch.tensor([bool(p) for p in prompts], device=device).to(embeds.dtype)
        embeds, pooled = embeds * given[:, None, None], pooled * given[:, None]
    last = (AESTHETIC_SCORE,) if time_ids(pipe.unet) == REFINER_IDS else size
    ids = torch.tensor([[*size, 0, 0, *last]], dtype=embeds.dtype, device=device)
    added = {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}


def _pixart(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    if pipe.transformer.use_additional_conditions:
        raise ConvFusionError(
            "PixArt-α models with resolution conditions are not supported in distillation; "
            "PixArt-Σ and PixArt-α at 256 and 512 are"
        )
    embeds, mask, _, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=pipe.transformer.device
    )
    return {
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor(class_labels(pipe, prompts), device=pipe.device)}


def class_labels(pipe: Any, prompts: list[str]) -> list[int]:
    """Labels of a DiT pipeline's classes, from names or numbers; '' is the label of no class."""
    none = pipe.transformer.config.num_embeds_ada_norm
    known = getattr(pipe, "labels", {})
    for prompt in prompts:
        number = prompt.isascii() and prompt.isdigit() and int(prompt) <= none
        if prompt and prompt not in known and not number:
            raise ConvFusionError(
                f"{prompt!r} is no class of this model: give a name or a number up to {none - 1}"
            )
    return [known[p] if p in known else int(p) if p else none for p in prompts]


def flat(conditioning: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor | None]:
    """Conditioning by dotted name: `{"a": {"b": x}}` → `{"a.b": x}`. Each tensor is [B, …]."""
    found: dict[str, Tensor | None] = {}
    for name, value in conditioning.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def nested(conditioning: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The keyword arguments that `flat` flattened."""
    found: dict[str, Any] = {}
    for name, value in conditioning.items():
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return found


def placed(conditioning: Mapping[str, Tensor | None], like: Denoiser) -> dict[str, Any]:
    """Flat conditioning as a denoiser takes it: nested, on its device, numbers in its dtype."""
    moved = {
        name: tensor
        if tensor is None
        else tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        for name, tensor in conditioning.items()
    }
    return nested(moved)


def latent_scale(pipe: Any) -> int:
    """Pixels per latent, along a side."""
    told = getattr(pipe, "vae_scale_factor", None)  # DiT pipelines do not tell
    return told or 2 ** (len(pipe.vae.config.block_out_channels) - 1)
