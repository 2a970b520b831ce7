"""From the bytes of a picture to latents: decode, fit to a size, encode."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from convfusion.text import open_plain

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".apng", ".jfif", ".jpe")
OTHER_PICTURES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2")  # not read
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow knows more, and runs a program to read some
PICTURE_BYTES = 1 << 29  # of an encoded picture

ORIENTATION = 0x0112  # in EXIF: what brings a picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
NEEDED = (b"tRNS", b"eXIf")  # of the chunks that a PNG can do without, those that tell of pixels


class UnusableError(Exception):
    """This sample is skipped; the message is the reason that it is counted under."""


def decode_picture(data: bytes | Path) -> Image.Image:
    """A picture in RGB, upright, with transparency on white.

    Raises:
        UnusableError: it is no picture of `FORMATS` in a plain file, damaged, or larger than
            Pillow's limit.
    """
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else open_plain(data) as file:
            try:
                return _decode(file)
            except Exception:  # a PNG is tried again without the texts and profiles in it
                file.seek(0)
                if file.read(len(PNG)) != PNG:
                    raise
                return _decode(io.BytesIO(_strip_metadata(file)))
    except Exception:  # decoders raise nearly anything on damaged files
        raise UnusableError("unreadable picture") from None


def _decode(data: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a picture's metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(data, formats=FORMATS) as file:
            file.load()
            picture: Image.Image = file
            if file.mode[0] in "IF":  # 16 bits and more of grey, which Pillow would clip
                raise ValueError("unsupported depth")
            # Pillow's own way to turn a picture also writes its EXIF anew, which can fail.
            if (turn := _find_turn(file)) is not None:
                picture = file.transpose(turn)
            picture = picture.convert("RGBA")
            on_white = Image.new("RGBA", picture.size, "white")
            on_white.alpha_composite(picture)
            return on_white.convert("RGB")


def _find_turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF says nothing of the pixels
        return None


def _strip_metadata(file: BinaryIO) -> bytes:
    """A PNG, read on from behind its signature, without texts, colour profile and the like.

    Pillow refuses a sound picture if one of them is long or damaged.
    """
    parts, left = [PNG], PICTURE_BYTES
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big") + 4  # with its check sum
        left -= length
        if left < 0:
            raise ValueError("too large")
        body = file.read(length)
        if head[4:5].isupper() or head[4:] in NEEDED:
            parts += [head, body]
    return b"".join(parts)


def crop_to_cover(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
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
        raise UnusableError("picture smaller than the size asked for")
    scale = max(height / picture.height, width / picture.width)
    around = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(around, Image.Resampling.LANCZOS)
    left, top = (around[0] - width) // 2, (around[1] - height) // 2
    return np.array(picture.crop((left, top, left + width, top + height)))


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray) -> Tensor:
    """Latents of pictures or clips, as the denoiser expects them.

    Args:
        vae: an `AutoencoderKL` or `AutoencoderTiny`, which takes the frames of a clip one by one,
            or one of clips such as `AutoencoderKLWan`, to which a picture is a clip of one frame;
            inside of `upcast_vae`.
        pictures: [B, H, W, 3] in 0…255, or clips [B, T, H, W, 3].

    Returns:
        [B, C, h, w], or [B, C, t, h, w] of clips, in float32 on the CPU: posterior means, shifted
        and scaled.
    """
    batch = torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
    batch, config = batch.to(device, vae.dtype), vae.config
    if batch.dim() == 5 and not takes_clips(vae):
        latents = torch.stack([_encode_means(vae, frame) for frame in batch.unbind(2)], dim=2)
    elif batch.dim() == 4 and takes_clips(vae):  # a picture is a clip of one frame
        latents = _encode_means(vae, batch[:, :, None])[:, :, 0]
    else:
        latents = _encode_means(vae, batch)
    moments = [_read_moment(vae, name) for name in ("latents_mean", "latents_std")]
    if all(each is not None for each in moments):
        mean, std = (each.view(1, -1, *[1] * (latents.dim() - 2)) for each in moments)
        return (latents - mean) * config.get("scaling_factor", 1.0) / std
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def takes_clips(vae: Any) -> bool:
    """Whether a VAE encodes the frames of a clip together."""
    return any(isinstance(module, nn.Conv3d) for module in getattr(vae, "encoder", vae).modules())


def _encode_means(vae: Any, batch: Tensor) -> Tensor:
    encoded = vae.encode(batch)
    if "latents" in encoded:  # an `AutoencoderTiny` has no distribution
        return encoded.latents.float().cpu()
    return encoded.latent_dist.mean.float().cpu()


def _read_moment(vae: Any, name: str) -> Any:
    """A mean or deviation of each channel [C], which LTX's VAE has among its tensors; or None."""
    told = vae.config.get(name)
    if told is not None:
        return torch.tensor(told)
    buffer = getattr(vae, name, None)
    return buffer.float().cpu() if isinstance(buffer, Tensor) else None


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
