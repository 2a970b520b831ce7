"""What an evaluation drew, on disk: a PNG of each picture, a folder of frames for each clip.

teacher/00000.png         a picture; of a clip, the strip of some of its frames
teacher/00000/000.png …   the frames of a clip
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convfusion.data.clips import draw_strip, read_clip
from convfusion.data.pictures import UnusableError
from convfusion.errors import ConvFusionError
from convfusion.files import file_digest, write_picture
from convfusion.folders import remove_remains


def picture_of(folder: Path, side: str, index: int) -> Path:
    """Where a picture lies, or the strip of a clip."""
    return folder / side / f"{index:05d}.png"


def clip_of(folder: Path, side: str, index: int) -> Path:
    """The folder with the frames of a clip."""
    return folder / side / f"{index:05d}"


def write_drawn(folder: Path, side: str, index: int, drawn: Any) -> None:
    """Write a picture, or a clip uint8 [T, H, W, 3] with its strip."""
    if not isinstance(drawn, np.ndarray):
        write_picture(picture_of(folder, side, index), drawn)
        return
    frames = clip_of(folder, side, index)
    frames.mkdir(exist_ok=True)
    remove_remains(frames)
    for number, frame in enumerate(drawn):
        write_picture(frames / f"{number:03d}.png", Image.fromarray(frame))
    write_picture(picture_of(folder, side, index), draw_strip(drawn))


def digest_drawn(folder: Path, side: str, index: int, frames: int | None) -> str:
    """The SHA-256 of a picture; of a clip, that of those of its frames.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if frames is None:
        return file_digest(picture_of(folder, side, index))
    place = clip_of(folder, side, index)
    digests = [file_digest(place / f"{number:03d}.png") for number in range(frames)]
    digests.append(file_digest(picture_of(folder, side, index)))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def read_pictures(folder: Path, side: str, count: int) -> Iterator[Image.Image]:
    """The pictures of a side, in order.

    Raises:
        ConvFusionError: one is damaged.
    """
    for index in range(count):
        path = picture_of(folder, side, index)
        try:
            with Image.open(path, formats=("PNG",)) as file:
                yield file.convert("RGB")
        except Exception:  # Pillow has many kinds for what is damaged
            raise _damaged(path) from None


def read_drawn(folder: Path, side: str, count: int, frames: int | None) -> Iterator[np.ndarray]:
    """The pictures or clips of a side, in order: uint8 [T, H, W, 3], of a picture with T = 1.

    Raises:
        ConvFusionError: one is damaged.
    """
    if frames is None:
        for picture in read_pictures(folder, side, count):
            yield np.asarray(picture)[None]
        return
    for index in range(count):
        path = clip_of(folder, side, index)
        try:
            yield read_clip(path, frames)
        except UnusableError:
            raise _damaged(path) from None


def _damaged(path: Path) -> ConvFusionError:
    return ConvFusionError(f"{path} is damaged: delete it, and the same command draws it again")
