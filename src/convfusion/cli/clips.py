"""What `convfusion generate` does for a model that draws videos."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.errors import ConvFusionError
from convfusion.imports import EXTRAS, is_installed

if TYPE_CHECKING:
    import numpy as np

Frames = Annotated[
    int | None,
    typer.Option(
        min=1, help="Frames of a clip, for models that draw videos. Default: the model's."
    ),
]
Speed = Annotated[
    float | None,
    typer.Option("--fps", help="Frames a second of a clip. Default: the model's own."),
]
CLIPS = (".mp4", ".gif")  # that are written


def choose_frames(pipe: Any, frames: int | None) -> int | None:
    """Frames of the clips that a pipeline draws, its own if none are told; None for pictures.

    Raises:
        ConvFusionError: a pipeline of pictures is asked for frames, or clips cannot have so many.
    """
    from convfusion.clips import check_frames
    from convfusion.families import native_frames

    own = native_frames(pipe)
    if not own:
        if frames is not None:
            raise ConvFusionError(f"a {type(pipe).__name__} draws pictures: leave --frames out")
        return None
    check_frames(pipe, frames or own)
    return frames or own


def check_clips(
    pipe: Any, out: Path, frames: int | None, fps: float | None, **unused: bool
) -> bool:
    """Whether a pipeline draws clips, and not pictures, after a look at the options.

    Args:
        pipe: the pipeline.
        out: where clips or pictures are to go.
        frames: asked for, or None.
        fps: frames a second that are asked for, or None.
        unused: whether each option that clips have no use for was given, by its name.

    Raises:
        ConvFusionError: an option is of the other kind, or a clip's number of frames or file
            cannot be had.
    """
    from convfusion.data.clips import check_fps
    from convfusion.data.pictures import PICTURES
    from convfusion.families import denoiser_of, family_of
    from convfusion.generate import check_frames

    if not family_of(denoiser_of(pipe)).frames:
        if frames is not None or fps is not None:
            raise ConvFusionError(
                f"a {type(pipe).__name__} draws pictures: leave --frames and --fps out"
            )
        if out.suffix.lower() in CLIPS:
            raise ConvFusionError(f"a {type(pipe).__name__} draws pictures: {out} would be a clip")
        return False
    if out.suffix.lower() in PICTURES:
        raise ConvFusionError(
            f"a {type(pipe).__name__} draws videos: name a folder, or a file such as "
            f"{out.with_suffix('.mp4').name}"
        )
    for name, given in unused.items():
        if given:
            raise ConvFusionError(f"--{name} is for pictures, and this model draws videos")
    if frames is not None:
        check_frames(pipe, frames)
    if fps is not None:
        check_fps(fps)
    return True


def name_clips(folder: Path, seeds: list[int]) -> list[Path]:
    """Names of new clips in a folder; without PyAV they are GIFs, which a line says."""
    from convfusion.cli.generate import number_files

    kind = ".mp4" if is_installed("av") else ".gif"
    if kind == ".gif":
        typer.echo(
            f"Clips are written as GIFs; with pip install 'convfusion[{EXTRAS['av']}]', as mp4."
        )
    return number_files(folder, seeds, kind)


def draw_clips(
    pipe: Any,
    prompts: list[str],
    size: tuple[int, int] | None,
    frames: int | None,
    settings: dict[str, Any],
) -> list[np.ndarray]:
    """A clip per prompt, with a progress bar; `settings` are further ones of `generate_clips`."""
    from convfusion.clips import generate_clips

    return generate_clips(pipe, prompts, size=size, frames=frames, progress=True, **settings)


def write_clips(
    pipe: Any,
    drawn: Iterable[tuple[Path, np.ndarray, str, int]],
    fps: float | None,
    **settings: Any,
) -> list[Path]:
    """Write files, clips, prompts and seeds, with what they were drawn with as tags of each.

    A strip of some frames lies beside each clip, as a PNG with the same texts.

    Args:
        pipe: that drew them.
        drawn: path, frames uint8 [T, H, W, 3], prompt and seed of each.
        fps: frames a second; None is the family's own.
        settings: of `describe_picture`.

    Returns:
        The paths of all files.
    """
    from convfusion.data.clips import draw_strip, write_clip
    from convfusion.families import denoiser_of, family_of
    from convfusion.generate import describe_picture, write_picture

    rate = family_of(denoiser_of(pipe)).frame_rate if fps is None else fps
    paths = []
    for path, frames, prompt, seed in drawn:
        record = describe_picture(pipe, prompt, seed=seed, frames=len(frames), **settings)
        strip = path.with_suffix(".png")
        write_clip(frames, path, rate, record)
        write_picture(strip, draw_strip(frames), record)
        paths += [path, strip]
    return paths
