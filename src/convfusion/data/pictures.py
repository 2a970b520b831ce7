"""From the bytes of a picture to latents: decode, fit to a size, encode."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows others, and runs a program to read some of them


class UnusableError(Exception):
    """This sample is skipped; the message is the reason that it is counted under."""


def decode_picture(data: bytes | Path) -> Image.Image:
    """A picture in RGB, upright, with transparency on white.

    Raises:
        UnusableError: it is no picture of `FORMATS`, damaged, or larger than Pillow's limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(
                io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS
            ) as file:
                upright = ImageOps.exif_transpose(file)
                if upright.mode[0] in "IF":  # 16 bits and more of grey, which Pillow would clip
                    raise ValueError("unsupported depth")
                upright = upright.convert("RGBA")
                on_white = Image.new("RGBA", upright.size, "white")
                on_white.alpha_composite(upright)
                return on_white.convert("RGB")
    except Exception:  # decoders raise nearly anything on damaged files
        raise UnusableError("unreadable picture") from None


def cover(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture shrunk to cover a size and cropped in the middle.

    Args:
        picture: in RGB.
        size: (height, width).

    Returns:
        [height, width, 3] in 0…255.

    Raises:
        UnusableError: it would have to be enlarged.
    """
    height, width = size
    if picture.height < height or picture.width < width:
        raise UnusableError("picture smaller than its size")
    scale = max(height / picture.height, width / picture.width)
    around = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(around, Image.Resampling.LANCZOS)
    left, top = (around[0] - width) // 2, (around[1] - height) // 2
    return np.array(picture.crop((left, top, left + width, top + height)))


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray) -> Tensor:
    """Latents of pictures, as the denoiser expects them.

    Args:
        vae: an `AutoencoderKL`, inside of `upcast_vae`.
        pictures: [B, H, W, 3] in 0…255.

    Returns:
        [B, C, h, w] in float32 on the CPU: posterior means, shifted and scaled.
    """
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
    latents = vae.encode(batch.to(device, vae.dtype)).latent_dist.mean.float().cpu()
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


@contextmanager
def upcast_vae(vae: Any) -> Iterator[None]:
    """Run a VAE that overflows in float16 in float32 for a while."""
    dtype = vae.dtype
    if not vae.config.get("force_upcast") or dtype == torch.float32:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
