"""Latents with captions: from pictures on disk, from a cache, or drawn by the teacher itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from convfusion.errors import ConvFusionError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class LatentDataset(Dataset):
    """Latents in memory, each with its caption.

    Attributes:
        latents: [P, C, h, w], scaled as the denoiser expects them.
        captions: P captions.
    """

    latents: Tensor
    captions: list[str]

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.captions) or not self.captions:
            raise ConvFusionError(
                f"there are {len(self.latents)} latents and {len(self.captions)} captions; "
                "as many of each are needed, and at least one"
            )
        if not self.latents.isfinite().all():
            raise ConvFusionError("some latents are not finite: was the VAE run in float16?")

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"latents": self.latents[index], "caption": self.captions[index]}


class StepSampler(Sampler[list[int]]):
    """The indices of each step's batch, a function of seed and step alone.

    Samples are drawn without replacement within an epoch; going on at a step needs no replay.
    """

    def __init__(self, size: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.first, self.last):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.size, generator=generator)
                batch.append(int(order[position % self.size]))
            yield batch

    def __len__(self) -> int:
        return self.last - self.first


def read_image_folder(folder: str | Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with their captions, from `NAME.txt` beside each picture.

    Raises:
        ConvFusionError: there are no pictures, or one has no caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvFusionError(f"{folder} is not a folder")
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not pictures:
        raise ConvFusionError(f"{folder} has no pictures ({', '.join(PICTURES)})")
    pairs = []
    for picture in pictures:
        text = picture.with_suffix(".txt")
        if not text.is_file():
            raise ConvFusionError(f"{picture} has no caption: {text.name} should hold it")
        pairs.append((picture, text.read_text(encoding="utf-8").strip()))
    return pairs


@torch.no_grad()
def encode_pictures(
    vae: Any, pictures: list[Path], size: tuple[int, int], *, batch_size: int = 16
) -> Tensor:
    """Latents of pictures, resized to cover (height, width) and cropped in the middle.

    Returns:
        [P, C, h, w] float32 on the CPU, posterior means times the VAE's scaling factor.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    dtype = vae.dtype
    if getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # such a VAE overflows in float16
    parts = []
    for start in range(0, len(pictures), batch_size):
        batch = torch.stack([load_picture(p, size) for p in pictures[start : start + batch_size]])
        latents = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mean
        parts.append(((latents - shift) * vae.config.scaling_factor).float().cpu())
    vae.to(dtype)
    return torch.cat(parts)


def load_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """One picture as [3, height, width] in −1…1, upright, transparency on white.

    Raises:
        ConvFusionError: the file is no picture.
    """
    height, width = size
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGBA")
            picture = Image.new("RGBA", upright.size, "white")
            picture.alpha_composite(upright)
            picture = picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ConvFusionError(f"{path} cannot be read as a picture: {error}") from None
    scale = max(height / picture.height, width / picture.width)
    around = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(around, Image.Resampling.LANCZOS)
    left, top = (around[0] - width) // 2, (around[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
