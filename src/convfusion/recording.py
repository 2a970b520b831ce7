"""Let a pipeline draw for what its denoiser is called with, and keep that."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of, family_of, native_frames
from convfusion.families.calls import frames_argument
from convfusion.generate import check_drawing, check_frames, draw_batches


def run_denoiser(
    pipe: Any,
    prompts: list[str],
    *,
    seeds: list[int] | None = None,
    steps: int = 25,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
    **options: Any,
) -> None:
    """Draw pictures or clips for what the denoiser is called with; they are not even decoded.

    Args:
        pipe, prompts, seeds, steps, guidance, size, progress, options: as for `generate`.
        frames: of clips, by default as many as the model was trained on.
        batch_size: prompts drawn at once.

    Raises:
        ConvFusionError: as for `generate`, or for frames that the pipeline cannot draw.
    """
    seeds = list(range(len(prompts))) if seeds is None else seeds
    family, native = family_of(denoiser_of(pipe)), native_frames(pipe)
    check_drawing(
        pipe, prompts, seeds, steps, guidance, size, batch_size, options, clips=native > 0
    )
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if native:
        check_frames(pipe, frames or native)
        settings[str(frames_argument(pipe))] = frames or native
    elif frames is not None:
        raise ConvFusionError(f"a {type(pipe).__name__} draws pictures, which have no frames")
    if family.gives_latents:
        settings["output_type"] = "latent"
    settings |= options
    for _ in draw_batches(pipe, prompts, seeds, size, batch_size, progress, settings):
        pass


@torch.no_grad()
def record_calls(
    pipe: Any,
    prompts: list[str],
    *,
    looks: int = 8,
    batch_size: int | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Draw prompts, and keep what the denoiser was called with at some of the steps.

    Args:
        pipe: a pipeline whose self-attention stands.
        prompts: what to draw; pictures or clips are thrown away.
        looks: calls that are kept of every batch, evenly spread over its steps.
        batch_size: prompts drawn at once; by default 8 pictures, or one clip.
        settings: as for `run_denoiser`, except `batch_size`.

    Returns:
        Keyword arguments of the denoiser, call by call, such as
        `convfusion.start_from_attention` takes.

    Raises:
        ConvFusionError: as `run_denoiser` does, or `looks` is less than 1.
    """
    if looks < 1:
        raise ConvFusionError(f"looks must be at least 1, not {looks}")
    model = denoiser_of(pipe)
    batch_size = batch_size or (1 if native_frames(pipe) else 8)
    signature = inspect.signature(type(model).forward)
    calls: list[dict[str, Any]] = []

    def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        calls.append({**dict(list(bound.items())[1:]), "return_dict": False})

    kept: list[dict[str, Any]] = []
    seeds = settings.pop("seeds", None) or list(range(len(prompts)))
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            calls.clear()
            run_denoiser(pipe, prompts[part], seeds=seeds[part], batch_size=batch_size, **settings)
            count = min(looks, len(calls))
            kept += [calls[(2 * i + 1) * len(calls) // (2 * count)] for i in range(count)]
    finally:
        handle.remove()
    return kept
