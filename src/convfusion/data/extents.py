"""How large the samples of a training set are, and of how many frames."""

from __future__ import annotations

from typing import Any

from convfusion.clips import check_frames
from convfusion.data.buckets import Extent, Size, choose_step, list_buckets, list_lengths
from convfusion.data.clip_folders import ClipFolder
from convfusion.data.samples import Source
from convfusion.data.sources import Prompts
from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of, family_of, frame_scale, native_frames, native_size
from convfusion.generate import check_size


def choose_sizes(
    pipe: Any, source: Source, size: Size | None, frames: int | None, wanted: bool
) -> list[Extent]:
    """The sizes that pictures or clips of a source are brought to.

    Args:
        pipe: whose VAE encodes them, or that draws them.
        source: of the samples.
        size: (height, width); by default the pipeline's own.
        frames: of clips; by default the pipeline's own.
        wanted: whether there are buckets, or one size.

    Returns:
        (height, width), or (frames, height, width) of clips, of each; first what was asked for.

    Raises:
        ConvFusionError: the pipeline cannot draw this, or the source is of another kind than what
            it draws.
    """
    size = size or native_size(pipe)
    check_size(pipe, size)
    length = choose_length(pipe, source, frames)
    if not wanted:
        return [(*length, *size)]
    if family_of(denoiser_of(pipe)).fixed_size:
        raise ConvFusionError("this model draws at its own size only: leave the buckets out")
    if isinstance(source, Prompts):
        raise ConvFusionError("the teacher draws prompts at one size: leave the buckets out")
    others = [each for each in list_buckets(size, choose_step(pipe, size)) if each != size]
    if not length:
        return [size, *others]
    lengths = [n for n in list_lengths(length[0], frame_scale(pipe)) if _can_draw(pipe, n)]
    return [(each, *sides) for each in lengths for sides in (size, *others)]


def _can_draw(pipe: Any, frames: int) -> bool:
    """Whether a pipeline draws clips of so many frames: some draw those of one length only."""
    try:
        check_frames(pipe, frames)
    except ConvFusionError:
        return False
    return True


def choose_length(pipe: Any, source: Source, frames: int | None) -> tuple[int, ...]:
    """(frames,) of clips; () of pictures.

    Raises:
        ConvFusionError: the source is not what the pipeline draws, or there are no latents of so
            many frames.
    """
    own, clips = native_frames(pipe), isinstance(source, ClipFolder)
    if not own:
        if clips:
            raise ConvFusionError(f"{source.spec} holds clips, and this pipeline draws pictures")
        if frames is not None:
            raise ConvFusionError("this pipeline draws pictures: leave the frames out")
        return ()
    if not clips and not isinstance(source, Prompts):
        raise ConvFusionError(
            f"{source.spec} holds pictures, and this pipeline draws videos: give a folder of clips "
            "(videos, GIFs or folders of frames, with captions beside them) or prompts"
        )
    frames = own if frames is None else frames
    check_frames(pipe, frames)
    return (frames,)
