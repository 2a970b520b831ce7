"""Draw clips with a video pipeline, each from a seed of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from convfusion.families import native_frames
from convfusion.families.calls import frames_argument
from convfusion.generate import check_drawing, check_frames, draw_batches


def generate_clips(
    pipe: Any,
    prompts: list[str],
    *,
    frames: int | None = None,
    seeds: list[int] | None = None,
    steps: int = 25,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
    **options: Any,
) -> list[np.ndarray]:
    """One clip per prompt; a clip depends on its prompt and seed, not on its batch.

    `convfusion.data.write_clip` writes one to a file, `save_strip` some of its frames.

    Args:
        pipe: a text-to-video pipeline, converted or not.
        prompts: what to draw.
        frames: T, by default as many as the model was trained on.
        seeds, steps, guidance, size, progress, options: as for `convfusion.generate.generate`.
        batch_size: prompts drawn at once.

    Returns:
        uint8 [T, H, W, 3] each.

    Raises:
        ConvFusionError: as for `generate`; or the pipeline draws no videos, or none of so many
            frames. Nothing is drawn.
    """
    seeds = list(range(len(prompts))) if seeds is None else seeds
    check_drawing(pipe, prompts, seeds, steps, guidance, size, batch_size, options, clips=True)
    frames = native_frames(pipe) if frames is None else frames
    check_frames(pipe, frames)
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "output_type": "np",
        str(frames_argument(pipe)): frames,
        **options,
    }
    clips: list[np.ndarray] = []
    for drawn in draw_batches(pipe, prompts, seeds, size, batch_size, progress, settings):
        clips.extend((255 * np.asarray(clip)).round().astype(np.uint8) for clip in drawn.frames)
    return clips
