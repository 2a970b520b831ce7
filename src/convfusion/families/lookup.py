"""What the rest of the library asks of a pipeline or denoiser, whatever its family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families.base import FAMILIES, Denoiser, Family, Size, family_of, supported_classes
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid
from convfusion.text import check_prompts


def component_names() -> list[str]:
    """The attributes of pipelines that may hold a denoiser."""
    return list(dict.fromkeys(family.component for family in FAMILIES.values()))


def denoiser_of(pipe_or_model: Any) -> Denoiser:
    """The denoiser of a pipeline, or the model itself.

    Raises:
        UnsupportedModelError: there is no denoiser, or no family knows it.
    """
    model = pipe_or_model
    names = component_names()
    if not isinstance(model, nn.Module):
        parts = (getattr(pipe_or_model, name, None) for name in names)
        model = next((part for part in parts if part is not None), None)
    if not isinstance(model, nn.Module):
        wanted = " or ".join(f"`{name}`" for name in names)
        raise UnsupportedModelError(
            f"{type(pipe_or_model).__name__} has no {wanted}; give a diffusers "
            f"pipeline or one of {', '.join(supported_classes())}"
        )
    family_of(model)
    return model


def denoisers_of(pipe_or_model: Any) -> dict[str, Denoiser]:
    """All denoisers of a pipeline by component, first that of `denoiser_of`.

    A model by itself has the name ''.

    Raises:
        UnsupportedModelError: as `denoiser_of`.
    """
    model = denoiser_of(pipe_or_model)
    if model is pipe_or_model:
        return {"": model}
    family = family_of(model)
    found = {family.component: model}
    for name in family.further_components:
        if (further := getattr(pipe_or_model, name, None)) is not None:
            found[name] = further
    return found


def check_alone(pipe_or_model: Any, work: str) -> None:
    """Raise a ConvFusionError for a pipeline with several denoisers.

    Args:
        pipe_or_model: a pipeline of a known family, or a denoiser.
        work: what knows of one denoiser only, in the plural.
    """
    names = list(denoisers_of(pipe_or_model))
    if len(names) > 1:
        raise ConvFusionError(
            f"this {type(pipe_or_model).__name__} has {len(names)} denoisers, "
            f"{' and '.join(names)}, and {work} know one: give each by itself, as pipe.{names[-1]}"
        )


def list_sites(model: Denoiser) -> list[Site]:
    """All self-attention sites of a denoiser.

    Raises:
        UnsupportedModelError: unknown class, or no self-attention of a kind we can replace.
    """
    sites = family_of(model).list_sites(model)
    if not sites:
        raise UnsupportedModelError(f"this {type(model).__name__} {family_of(model).without_sites}")
    return sites


def site_grid(model: Denoiser, site: Site, latents: Grid) -> Grid:
    """The grid of the tokens of a site.

    Args:
        model: a denoiser of a known family.
        site: of it.
        latents: (height, width), or (frames, height, width) of a video, which without a number of
            frames has the family's own.

    Returns:
        (H, W) or (T, H, W).
    """
    family = family_of(model)
    patch = family.patch_size(model)
    *frames, height, width = _with_frames(family, latents)
    height, width = (-(-side // 2**site.level) // patch for side in (height, width))
    return (*frames, height, width)[-site.rank :]  # of frames that are mixed each by itself


def _with_frames(family: Family, latents: Grid) -> Grid:
    """Sides of latents, with the family's own number of frames where none is told."""
    return (family.frames, *latents) if family.frames and len(latents) == 2 else latents


def count_sequences(model: Denoiser, site: Site, latents: Grid = ()) -> int:
    """How many sequences of tokens a site mixes for one sample: 1, but for frames by themselves.

    These are as many as the latents (frames, height, width) have, by default the family's own.
    """
    frames = latents[0] if len(latents) == 3 else family_of(model).frames
    return frames or 1 if site.rank == 2 else 1


def block_family(model: Denoiser) -> str:
    """The name of the family that the blocks of a denoiser are saved for."""
    family = family_of(model)
    return family.shares_blocks_with or family.name


def native_latents(model: Denoiser) -> Size:
    """(height, width) of the latents that a denoiser was trained on, by its config."""
    return family_of(model).native_latents(model)


def noisy_latents(model: Denoiser, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The latents among the arguments of a call of a denoiser, as they are there.

    They are [B, C, h, w] in most models, or a list of samples (Z-Image).
    """
    return args[0] if args else kwargs[family_of(model).latents]


def stack_samples(given: Any) -> Tensor:
    """What a denoiser is given or gives, in one tensor also where it has a list of samples."""
    return given if isinstance(given, Tensor) else torch.stack(list(given))


def arrange_call(
    model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of one call of a denoiser, which then returns a tuple.

    Args:
        model: a denoiser of a known family.
        latents: noisy, [B, C, h, w] or [B, C, t, h, w], whatever layout the model takes.
        timesteps: [B], as the model is told them.
        conditioning: its further arguments.
    """
    arranged = family_of(model).arrange_inputs(model, latents, timesteps, conditioning)
    return {**arranged, "return_dict": False}


def call_denoiser(
    model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
) -> Tensor:
    """What a denoiser gives for noisy latents, laid out as they are: [B, C, h, w] or with frames.

    C may be larger than that of the latents, by a learned variance, or smaller, where they hold a
    picture or mask too. Arguments as for `arrange_call`.
    """
    family = family_of(model)
    output = model(**arrange_call(model, latents, timesteps, conditioning))
    if not isinstance(output, Tensor):  # a Kandinsky 5 gives no tuple
        output = output[0]
    unpacked = family.unpack_latents(model, output, tuple(latents.shape[2:]))
    return -unpacked if family.negated else unpacked


def encode_conditioning(pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
    """Keyword arguments of the denoiser for a batch of prompts, without guidance.

    Args:
        pipe: a text-to-image or class-to-image pipeline of a known family.
        prompts: one per sample; class names or numbers for DiT.
        size: (height, width) of the pictures in pixels (SDXL takes it).

    Raises:
        ConvFusionError: a prompt is no text, or no class of a DiT; or the denoiser takes
            more than that, see `check_captioned`.
    """
    check_prompts(prompts)
    check_captioned(pipe)
    with torch.no_grad():
        return family_of(denoiser_of(pipe)).encode_prompts(pipe, prompts, size)


def check_captioned(pipe: Any) -> None:
    """Raise a ConvFusionError if a denoiser needs more than latents, a timestep and a caption.

    Such models can be converted and drawn with. Their training and measurement need more than
    pictures with captions.
    """
    check_alone(pipe, "caches, distillation and evaluation")
    model, vae = denoiser_of(pipe), getattr(pipe, "vae", None)
    if not family_of(model).captioned:
        raise ConvFusionError(
            f"a {type(pipe).__name__} draws without captions, which caches, distillation and "
            "evaluation go by. It can be converted, and drawn with in Python"
        )
    channels, latents = family_of(model).latent_channels(model), None
    if vae is not None:
        latents = vae.config.get("latent_channels", vae.config.get("z_dim"))  # of videos
    more = family_of(model).describe_further_needs(model)
    if latents not in (None, channels):
        more = f"{channels} channels, and its latents have {latents}: a picture or mask"
    if more:
        raise ConvFusionError(
            f"the denoiser of this {type(pipe).__name__} takes {more}, beside a caption. It can be "
            "converted, and drawn with in Python; caches, distillation and evaluation know "
            "captions only"
        )


def example_inputs(
    model: Denoiser,
    size: Grid,
    *,
    batch: int = 1,
    words: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of a denoiser, filled with fixed random values.

    Args:
        model: a denoiser of a known family.
        size: (height, width) of the latents, or (frames, height, width) of a video's.
        batch: samples.
        words: tokens of the text; by default as many as the family's text encoder gives.
        device: of the tensors, by default the model's; `meta` gives shapes alone.

    Raises:
        ConvFusionError: the model takes something of a kind that is not known here.
    """
    family = family_of(model)
    sides = _with_frames(family, size)
    values = Values(model, model.device if device is None else device, sides)
    return {
        family.latents: values(*family.latent_shape(model, batch, sides)),
        family.times: family.tell(torch.full((batch,), 500, device=values.device)),
        "return_dict": False,
        **family.example_conditioning(model, batch, words, values),
    }


def latent_scale(pipe: Any) -> int:
    """Pixels per latent, along a side."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
        if scale := getattr(pipe, name, None):
            return scale
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)  # of DiT, whose pipelines tell none


def frame_scale(pipe: Any) -> int:
    """Frames of a video per frame of its latents; its first frame has one of its own."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        if scale := getattr(pipe, name, None):
            return scale
    return 1


def native_frames(pipe: Any) -> int:
    """Frames of the videos that a pipeline's denoiser was trained on; 0 where it draws pictures."""
    frames = family_of(denoiser_of(pipe)).frames
    return (frames - 1) * frame_scale(pipe) + 1 if frames else 0


def unpack_drawn(
    pipe: Any, packed: Tensor, size: Size | None = None, frames: int | None = None
) -> Tensor:
    """Latents as a pipeline has them while it draws, as [B, C, h, w] or [B, C, t, h, w].

    Args:
        pipe: a pipeline of a known family.
        packed: its latents.
        size: (height, width) of what is drawn in pixels, by default the pipeline's own.
        frames: of a clip; None for a picture.
    """
    scale, model = latent_scale(pipe), denoiser_of(pipe)
    height, width = size or native_size(pipe)
    own = () if frames is None else ((frames - 1) // frame_scale(pipe) + 1,)
    return family_of(model).unpack_latents(model, packed, (*own, height // scale, width // scale))


def pack_drawn(pipe: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] of pictures as a pipeline has them while it draws."""
    model = denoiser_of(pipe)
    return family_of(model).pack_drawn(model, latents)


def native_size(pipe: Any) -> Size:
    """(height, width) in pixels of the pictures that a pipeline's denoiser was trained on."""
    scale = latent_scale(pipe)
    height, width = native_latents(denoiser_of(pipe))
    return height * scale, width * scale


def pixel_unit(pipe: Any) -> int:
    """What both sides of a picture must be multiples of, in pixels."""
    return pixel_unit_of(denoiser_of(pipe), latent_scale(pipe))


def pixel_unit_of(model: Denoiser, scale: int) -> int:
    """The same of a denoiser, with an autoencoder of so many pixels to a latent."""
    unit = scale * family_of(model).patch_size(model)
    return math.lcm(unit, 8)  # which stock pipelines insist on, whatever their autoencoder


def shorten_path(path: str) -> str:
    """A site's path, shortened: `down 0 1` is the second attention of the first down block."""
    names = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid"}
    words = path.removesuffix(".attn1").replace("transformer_blocks", "block").split(".")
    words = [names.get(word, word) for word in words if word != "attentions"]
    if words[0] == "mid":
        words = [words[0], *words[2:]]
    text = " ".join(words)
    return text.replace(" block 0", "") if "down" in text or "up" in text or "mid" in text else text
