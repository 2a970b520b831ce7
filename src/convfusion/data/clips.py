"""Clips of video: read from a folder of frames, a GIF, an mp4 or a webm, and written again.

Frames are uint8 arrays [T, H, W, 3]. Folders of frames and GIFs need Pillow alone; other files need
PyAV, of the extra `video`. What is read is not trusted: a file is decoded as what its name says it
is, never as a playlist that may name other files, and decoding ends with the last frame asked for.
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convfusion import files
from convfusion.data.folders import list_files
from convfusion.data.pictures import PICTURES, UnusableError, crop_to_cover, decode_picture
from convfusion.errors import ConvFusionError
from convfusion.imports import check_installed
from convfusion.text import open_plain

# FFmpeg's name of the format by the end of a file's name.
VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska"}
GIF = ".gif"
WITHOUT = "use GIFs or folders of frames, which need no further package"

STRIP_FRAMES = 6  # that a strip shows
STRIP_SIDE = 320  # pixels of the longer side of a frame in it, at most
GAP = 2  # pixels between them

_UNKNOWN_DELAY = 100  # milliseconds that browsers show a frame of a GIF that tells none
_BT709 = 1  # in FFmpeg's tables of colours, as is the range that televisions use
_CRF = 14  # of x264: smaller is better, 0 keeps every bit, 18 looks the same to most people


def read_clip(
    path: str | Path, frames: int, size: tuple[int, int] | None = None, *, every: int = 1
) -> np.ndarray:
    """The first frames of a clip, each shrunk to cover a size and cropped in the middle.

    Args:
        path: of a folder of frames, which are taken in the order of the numbers in their names, or
            of a file that ends in .gif, .mp4, .m4v, .mov, .webm or .mkv.
        frames: T, how many to read.
        size: (height, width); None keeps the clip's own.
        every: 1 takes successive frames, 2 every second one, and so on.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        UnusableError: it is damaged, too short, or smaller than the size.
        ConvFusionError: it needs PyAV, which is missing; or a number is less than 1.
    """
    path = Path(path)
    if frames < 1 or every < 1:
        raise ConvFusionError("frames and every must be at least 1")
    if path.suffix.lower() in VIDEOS and not path.is_dir():
        check_installed("av", advice=WITHOUT)
    last = (frames - 1) * every + 1
    try:
        pictures = islice(_open_frames(path, last), 0, last, every)
        read = [_fit(picture, size) for picture in pictures]
    except (UnusableError, ConvFusionError):
        raise
    except Exception:  # decoders raise nearly anything on damaged files
        raise UnusableError("unreadable clip") from None
    if len(read) < frames:
        raise UnusableError("fewer frames than asked for")
    if any(picture.shape != read[0].shape for picture in read):
        raise UnusableError("frames of several sizes")
    return np.stack(read)


def list_clips(folder: str | Path) -> list[Path]:
    """The clips in a folder and its subfolders, in order; what is hidden does not count.

    A folder that directly holds two pictures or more, and no file of a video, is one clip.

    Raises:
        ConvFusionError: there are none, or PyAV is needed to read them and is missing.
    """
    folder = Path(folder)
    names = list_files(folder).files if folder.is_dir() else []
    clips = [name for name in names if is_clip(name)]
    beside = {posixpath.dirname(name) for name in clips}
    homes = [posixpath.dirname(name) for name in names if name.lower().endswith(PICTURES)]
    clips += sorted({home for home in homes if homes.count(home) > 1 and home not in beside})
    if not clips:
        raise ConvFusionError(
            f"{folder} has no clips: they are folders of frames, or files that end in "
            f"{', '.join((GIF, *VIDEOS))}"
        )
    if any(Path(name).suffix.lower() in VIDEOS for name in clips):
        check_installed("av", advice=WITHOUT)
    return [folder / name for name in sorted(clips, key=lambda name: name.split("/"))]


def has_clips(folder: str | Path) -> bool:
    """Whether there is a GIF or a video in a folder or its subfolders."""
    return Path(folder).is_dir() and any(map(is_clip, list_files(Path(folder)).files))


def is_clip(name: str) -> bool:
    """Whether a file is a clip, by the end of its name."""
    return name.lower().endswith((GIF, *VIDEOS))


def write_clip(
    frames: np.ndarray, path: str | Path, fps: float, record: Mapping[str, str] | None = None
) -> None:
    """Write a clip, whole or not at all: an mp4 in H.264, or a GIF.

    Args:
        frames: uint8 [T, H, W, 3].
        path: that ends in .mp4, which needs PyAV, or in .gif. An mp4's sides are even: the last
            row or column of an odd one is written twice.
        fps: frames a second.
        record: text by key, such as `convfusion.generate.describe_picture` gives. An mp4 keeps it
            among its tags, a GIF keeps the text of `parameters` as its comment.

    Raises:
        ConvFusionError: PyAV is needed and missing, or the name ends otherwise.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    check_clip_name(path)
    check_fps(fps)
    encode = _encode_gif if path.suffix.lower() == GIF else _encode_mp4
    files.write_bytes(path, encode(frames, fps, dict(record or {})))


def check_clip_name(path: Path) -> None:
    """Raise a ConvFusionError unless `write_clip` can write a file of this name."""
    if path.suffix.lower() not in (".mp4", GIF):
        raise ConvFusionError(f"{path} should end in .mp4 or .gif: clips are written so")
    if path.suffix.lower() == ".mp4":
        check_installed("av", advice="give a name that ends in .gif, which needs no package")


def check_fps(fps: float) -> None:
    """Raise a ConvFusionError for a number of frames a second that no file has."""
    if not 0 < fps <= 1000:
        raise ConvFusionError(f"a clip has more than 0 and up to 1000 frames a second, not {fps:g}")


def draw_strip(frames: np.ndarray, count: int = STRIP_FRAMES) -> Image.Image:
    """Some frames of a clip beside each other, evenly spaced from the first to the last.

    Frames with a side of more than 320 pixels are shrunk.

    Args:
        frames: uint8 [T, H, W, 3].
        count: of frames to show; all of a clip that has no more.
    """
    chosen = [Image.fromarray(frames[number]) for number in spread_frames(len(frames), count)]
    for picture in chosen:
        picture.thumbnail((STRIP_SIDE, STRIP_SIDE), Image.Resampling.LANCZOS)
    width, height = chosen[0].size
    strip = Image.new("RGB", (len(chosen) * (width + GAP) - GAP, height), "white")
    for number, picture in enumerate(chosen):
        strip.paste(picture, (number * (width + GAP), 0))
    return strip


def save_strip(frames: np.ndarray, path: str | Path, count: int = STRIP_FRAMES) -> None:
    """Write the strip of a clip that `draw_strip` draws, as a PNG.

    Raises:
        CheckpointError: the file cannot be written.
    """
    files.write_picture(Path(path), draw_strip(frames, count))


def spread_frames(frames: int, count: int) -> list[int]:
    """Numbers of `count` frames at most, evenly spaced from the first to the last."""
    if count >= frames:
        return list(range(frames))
    return [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]


def _fit(picture: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    return np.array(picture) if size is None else crop_to_cover(picture, size)


def _open_frames(path: Path, last: int) -> Iterator[Image.Image]:
    """The frames of a clip in RGB, one after the other, of which the first `last` are wanted."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
        pictures = sorted((n for n in names if n.lower().endswith(PICTURES)), key=_split_numbers)
        return (decode_picture(path / name) for name in pictures)
    if path.suffix.lower() == GIF:
        return _decode_gif(path, last)
    if path.suffix.lower() in VIDEOS:
        return _decode_video(path)
    raise UnusableError("no clip")


def _split_numbers(name: str) -> list[Any]:
    """A key that sorts `frame10` behind `frame9`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _decode_gif(path: Path, last: int) -> Iterator[Image.Image]:
    """Frames of a GIF at the pace of its shortest one.

    GIFs have longer frames where nothing moves; such a frame comes as often as fits its time.
    """
    with _opened_gif(path) as (file, count):
        delays = []
        for number in range(min(count, last)):
            file.seek(number)
            delays.append(file.info.get("duration") or _UNKNOWN_DELAY)
        for number, delay in enumerate(delays):
            file.seek(number)
            picture = file.convert("RGBA")
            on_white = Image.new("RGBA", picture.size, "white")
            on_white.alpha_composite(picture)
            yield from [on_white.convert("RGB")] * min(round(delay / min(delays)), last)


@contextmanager
def _opened_gif(path: Path) -> Iterator[tuple[Any, int]]:
    with open_plain(path) as data, Image.open(data, formats=("GIF",)) as file:
        yield file, getattr(file, "n_frames", 1)


def _decode_video(path: Path) -> Iterator[Image.Image]:
    import av

    kind = VIDEOS[path.suffix.lower()]
    with (
        open_plain(path) as data,
        av.open(data, "r", format=kind, metadata_errors="replace") as container,
    ):
        video = container.streams.video[0]
        if video.width * video.height > (Image.MAX_IMAGE_PIXELS or np.inf):
            raise UnusableError("clip of too many pixels")
        for frame in container.decode(video):
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            # A telephone that is held upright writes how the picture must be turned.
            yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _encode_gif(frames: np.ndarray, fps: float, record: Mapping[str, str]) -> bytes:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=max(10, round(100 / fps) * 10),  # which GIFs count in hundredths of a second
        loop=0,
        comment=record.get("parameters", "").encode(),
    )
    return buffer.getvalue()


def _encode_mp4(frames: np.ndarray, fps: float, record: Mapping[str, str]) -> bytes:
    """H.264 in BT.709, whose colours every player shows alike since the file names them."""
    import av

    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    options = {"movflags": "use_metadata_tags"}  # else only a few names of tags are kept
    with av.open(buffer, "w", format="mp4", options=options) as container:
        container.metadata.update(record)
        if "parameters" in record:
            container.metadata["comment"] = record["parameters"]  # which players show
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # which browsers play
        stream.options = {"crf": str(_CRF)}
        stream.codec_context.thread_count = 1  # so that a clip is the same bytes each time
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, _BT709)
        for packet in _encode_frames(stream, frames):
            container.mux(packet)
    return buffer.getvalue()


def _encode_frames(stream: Any, frames: np.ndarray) -> Iterator[Any]:
    import av

    for frame in frames:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yield from stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709"))
    yield from stream.encode()
