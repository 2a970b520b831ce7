"""Draw pictures with a pipeline, each from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from convfusion.adapters import Denoiser, adapter_for, denoiser_of
from convfusion.batching import check_call, cut_options
from convfusion.conditioning import class_labels, latent_scale
from convfusion.errors import ConvFusionError
from convfusion.patches import copied_without_patches, replaced_attributes

NO_CLASS = 1000  # under guidance, in diffusers' DiT pipeline
SEEDS = 2**64  # of torch's generators
GUIDANCES = 1e3  # far above any that a model is used with


def generate(
    pipe: Any,
    prompts: list[str],
    *,
    seeds: list[int] | None = None,
    steps: int = 25,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    **options: Any,
) -> list[Image.Image]:
    """One picture per prompt; a picture depends on its prompt and seed, not on its batch.

    Args:
        pipe: a text-to-image or DiT pipeline, converted or not.
        prompts: what to draw; for DiT class names or numbers.
        seeds: one per prompt, each in [0, 2⁶⁴); by default 0, 1, 2, …
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less is none.
        size: (height, width) in pixels, by default the pipeline's own.
        batch_size: prompts drawn at once.
        options: further arguments of the pipeline's call. Lists and tensors with one for each
            prompt, such as pictures, negative prompts, latents or embeddings, are cut with the
            batches. `prompt_embeds` take the place of the prompts, which are then only counted.

    Raises:
        ConvFusionError: there are not as many seeds or other options as prompts, a number is out of
            range, or the pipeline draws from more than it is given. Nothing is drawn.
    """
    check_call(pipe, prompts, size, options)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ConvFusionError(f"there are {len(prompts)} prompts and {len(seeds)} seeds")
    check_numbers(seeds, steps, guidance, batch_size)
    check_steps(pipe, steps)
    if size is not None:
        check_size(pipe, size)
    family = adapter_for(denoiser_of(pipe)).family
    of_classes = family == "dit"
    if of_classes and size is not None:
        raise ConvFusionError("a DiT pipeline draws at its own size only: leave the size out")
    check_guidance(pipe, guidance)
    if family == "pixart":  # else it draws at the nearest size of its training and resizes that
        options.setdefault("use_resolution_binning", False)
    sides = {} if size is None else {"height": size[0], "width": size[1]}
    images: list[Image.Image] = []
    with silent(pipe):
        for start in range(0, len(prompts), batch_size):
            stop = start + batch_size
            part: Any = prompts[start:stop]
            if of_classes:
                part = class_labels(pipe, part)
            elif options.get("prompt_embeds") is not None:
                part = None
            drawn = pipe(
                **{"class_labels" if of_classes else "prompt": part},
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start:stop]],
                **sides,
                **cut_options(pipe, options, start, stop, len(prompts)),
            ).images
            images.extend(drawn)  # `+=` would add an array of numpy, which old diffusers give
    return images


def check_numbers(seeds: Iterable[int], steps: int, guidance: float, batch_size: int) -> None:
    """Raise a ConvFusionError for numbers that no pipeline can draw with."""
    if steps < 1 or batch_size < 1:
        raise ConvFusionError("steps and batch_size must be at least 1")
    if not 0 <= guidance < GUIDANCES:
        raise ConvFusionError(
            f"guidance must be from 0 to {GUIDANCES:g}, not {guidance:g} (1 or less is none)"
        )
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ConvFusionError(f"seeds must be 0 or more and below 2⁶⁴, not {seed}")


def check_steps(pipe: Any, steps: int) -> None:
    """Raise a ConvFusionError if there are more steps than timesteps to take."""
    timesteps = getattr(pipe.scheduler.config, "num_train_timesteps", math.inf)
    scheduler = copied_without_patches(pipe.scheduler)
    if steps <= timesteps:
        scheduler.set_timesteps(steps)
    # Some spacings begin at the end of the schedule plus an offset, which may lie beyond it.
    if steps > timesteps or max(scheduler.timesteps) >= timesteps:
        raise ConvFusionError(
            f"{steps} steps cannot be drawn: the noise schedule has {timesteps} timesteps, and "
            "fewer steps than those are needed"
        )


def check_size(pipe: Any, size: tuple[int, int]) -> None:
    """Raise a ConvFusionError unless the denoiser can work on pictures of (height, width)."""
    unit = size_unit(pipe)
    if any(side < unit or side % unit for side in size):
        near = [max(unit, round(side / unit) * unit) for side in size]
        raise ConvFusionError(
            f"{size[1]}×{size[0]} cannot be drawn: both sides must be multiples of {unit}; "
            f"the nearest size is {near[1]}×{near[0]}"
        )


def check_guidance(pipe: Any, guidance: float) -> None:
    """Raise a ConvFusionError if the pipeline would take one of its classes for no class."""
    if guidance > 1 and not can_guide(pipe):
        raise ConvFusionError(
            f"this model has {denoiser_of(pipe).config.num_embeds_ada_norm} classes, and "
            f"diffusers' DiT pipeline takes class {NO_CLASS} for none: it draws with a guidance "
            "of 1 only"
        )


def can_guide(pipe: Any) -> bool:
    """Whether a pipeline can draw with a guidance above 1: a DiT if it has 1000 classes."""
    denoiser = denoiser_of(pipe)
    if adapter_for(denoiser).family != "dit":
        return True
    return denoiser.config.num_embeds_ada_norm == NO_CLASS


def size_unit(pipe: Any) -> int:
    """What both sides of a picture must be multiples of, in pixels."""
    return unit_of(denoiser_of(pipe), latent_scale(pipe))


def unit_of(denoiser: Denoiser, scale: int) -> int:
    """The same of a denoiser, with a VAE of so many pixels to a latent."""
    unit = scale * denoiser.config.get("patch_size", 1)
    return math.lcm(unit, 8)  # which stock pipelines insist on, whatever their VAE


@contextmanager
def swapped_denoiser(pipe: Any, denoiser: Denoiser) -> Iterator[Any]:
    """Let a pipeline draw with another denoiser of the same family for a while."""
    own = denoiser_of(pipe)
    name = "unet" if getattr(pipe, "unet", None) is own else "transformer"
    with replaced_attributes(pipe, **{name: denoiser}):
        yield pipe


@contextmanager
def silent(pipe: Any) -> Iterator[None]:
    """Draw without the pipeline's own progress bar."""
    told = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    with replaced_attributes(pipe, _progress_bar_config=told):
        yield
