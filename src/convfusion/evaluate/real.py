"""Real pictures and clips that drawn ones are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from convfusion.data.clips import list_clips, read_clip
from convfusion.data.folders import PictureFolder
from convfusion.data.latents import LatentDataset
from convfusion.data.pictures import UnusableError, crop_to_cover, decode_picture, upcast_vae
from convfusion.data.sources import Prompts, open_source
from convfusion.errors import ConvFusionError

Counted = dict[str, int]


@dataclass(frozen=True)
class RealPictures:
    """Pictures of one size, read as they are needed.

    Attributes:
        spec: what the report calls them.
        read: gives every encoded picture or its file, and None with the reason for what has none.
        size: (height, width) that they are shrunk to cover, and cropped to.
        skipped: how many could not be used, by reason; filled while they are read.
    """

    spec: str
    read: Callable[[], Iterator[tuple[Any, str]]]
    size: tuple[int, int]
    skipped: Counted = field(default_factory=dict)

    def __iter__(self) -> Iterator[Image.Image]:
        self.skipped.clear()
        for picture, problem in self.read():
            try:
                if picture is None:
                    raise UnusableError(problem)
                if not isinstance(picture, Image.Image):
                    picture = decode_picture(picture)
                yield Image.fromarray(crop_to_cover(picture, self.size))
            except UnusableError as error:
                self.skipped[str(error)] = self.skipped.get(str(error), 0) + 1


@dataclass(frozen=True)
class RealClips:
    """Clips of one size and number of frames, read as they are needed.

    Attributes:
        spec: what the report calls them.
        paths: of the clips, as `data.list_clips` gives them.
        frames: that are read of each, the first ones.
        size: (height, width) that they are shrunk to cover, and cropped to.
        skipped: how many could not be used, by reason; filled while they are read.
    """

    spec: str
    paths: tuple[Path, ...]
    frames: int
    size: tuple[int, int]
    skipped: Counted = field(default_factory=dict)

    def __iter__(self) -> Iterator[np.ndarray]:
        self.skipped.clear()
        for path in self.paths:
            try:
                yield read_clip(path, self.frames, self.size)
            except UnusableError as error:
                self.skipped[str(error)] = self.skipped.get(str(error), 0) + 1


def open_real_clips(folder: str, frames: int, size: tuple[int, int]) -> RealClips:
    """Real clips of a folder, as `data.list_clips` finds them.

    Args:
        folder: with clips in it or in its subfolders.
        frames: of the drawn clips.
        size: (height, width) of the drawn clips.

    Raises:
        ConvFusionError: there are none, or PyAV is missing that some of them need.
    """
    return RealClips(Path(folder).name or folder, tuple(list_clips(folder)), frames, size)


def open_real(spec: str, size: tuple[int, int]) -> RealPictures:
    """Real pictures by name.

    Args:
        spec: what `data.open_source` takes, except prompts; captions are not needed.
        size: (height, width) of the drawn pictures.

    Raises:
        ConvFusionError: there are none.
    """
    source = open_source(spec, captioned=False)
    if isinstance(source, Prompts):
        raise ConvFusionError(f"{spec} holds prompts, and real pictures are asked for")

    def samples() -> Iterator[tuple[Any, str]]:
        for unit in range(source.units):
            for sample in source.read(unit):
                yield sample.picture, sample.problem

    name = Path(spec).name if isinstance(source, PictureFolder) else spec
    return RealPictures(name or spec, samples, size)


@torch.no_grad()
def decoded(
    pipe: Any, data: LatentDataset, spec: str, size: tuple[int, int], batch_size: int = 32
) -> RealPictures:
    """Pictures that are at hand as latents only, as the pipeline's VAE decodes them."""
    from diffusers.image_processor import VaeImageProcessor

    def pictures() -> Iterator[tuple[Any, str]]:
        vae, processor = pipe.vae, VaeImageProcessor()  # of its own: DiT pipelines have none
        with upcast_vae(vae):
            for part in data.latents.split(batch_size):
                scaled = part.to(vae.device, vae.dtype) / vae.config.scaling_factor
                with torch.no_grad():
                    pixels = vae.decode(scaled, return_dict=False)[0]
                for image in processor.postprocess(pixels, output_type="pil"):
                    yield image, ""

    return RealPictures(spec, pictures, size)
