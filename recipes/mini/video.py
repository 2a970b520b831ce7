"""The fifth mini model: a `WanPipeline` for clips of one emoji that moves over a plain ground.

64×64 pixels, 17 frames; in latents 8×5×16×16 of an `AutoencoderKLWan` that is four times smaller
along each axis, in tokens 5×8×8. A caption names the emoji, its motion and the ground: `dog face
moves left on pink`. The weights that `video_teacher.py` trained lie in `video/` beside this file,
in float16, with the sheet of 40 Noto emoji (Apache-2.0) that all clips are drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

from convfusion.checkpoint.pipelines import in_dtype
from convfusion.data import LatentDataset
from convfusion.mini import HeldOut

KEPT = Path(__file__).parent / "video"
SHEET = KEPT / "emoji.png"
FRAMES, SIZE = 17, 64  # of a clip; pixels
TILE, TILES_PER_ROW = 32, 8  # of the sheet; pixels and emoji
STRIP = (0, 4, 8, 12, 16)  # frames that are shown of a clip
GUIDANCE, STEPS = 3.0, 20  # that clips are drawn with
EMOJI = (
    "dog face", "cat face", "frog face", "pig face", "panda face", "lion face", "monkey face",
    "rabbit face", "penguin", "octopus", "tropical fish", "honeybee", "butterfly", "lady beetle",
    "snail", "red apple", "banana", "lemon", "strawberry", "cherries", "carrot", "hamburger",
    "slice of pizza", "doughnut", "sun with face", "crescent moon", "blue heart", "balloon",
    "soccer ball", "automobile", "rocket", "airplane", "alarm clock", "bell", "key", "mushroom",
    "sunflower", "cactus", "ghost", "umbrella",
)  # fmt: skip
MOTIONS = (
    "moves left", "moves right", "moves up", "moves down", "spins", "grows", "shrinks", "bounces",
)  # fmt: skip
GROUNDS = {
    "white": (240, 240, 240),
    "pink": (240, 190, 200),
    "yellow": (240, 225, 150),
    "green": (180, 225, 180),
    "blue": (170, 205, 240),
    "grey": (130, 130, 130),
}

Side = Literal["train", "choice", "results"]


@dataclass(frozen=True)
class Clip:
    """What a clip shows.

    Attributes:
        emoji: of `EMOJI`.
        motion: of `MOTIONS`.
        ground: of `GROUNDS`.
        size: of the emoji, in pixels.
        reach: how far it moves, as a share of the most that keeps it in the picture.
        offset: (x, y) of the middle of its way from the middle of the picture, in pixels.
    """

    emoji: str
    motion: str
    ground: str
    size: float
    reach: float
    offset: tuple[float, float]

    @property
    def caption(self) -> str:
        """`dog face moves left on pink`."""
        return f"{self.emoji} {self.motion} on {self.ground}"


def pairs(side: Side) -> list[tuple[str, str]]:
    """Emoji with their motions: 240 to train on, 40 in each held-out list.

    Each emoji has one motion in either held-out list and six in training; each motion is held out
    for five emoji in either list.
    """
    held = {"choice": 0, "results": 4}
    found = []
    for i, emoji in enumerate(EMOJI):
        for m, motion in enumerate(MOTIONS):
            shift = (m - i) % len(MOTIONS)
            if shift == held[side] if side in held else shift not in held.values():
                found.append((emoji, motion))
    return found


def clip(side: Side, number: int) -> Clip:
    """A clip of a side: the pairs in turn; all else about it is drawn by its number."""
    own = pairs(side)
    emoji, motion = own[number % len(own)]
    generator = torch.Generator().manual_seed(number)
    size, reach, x, y = torch.rand(4, generator=generator).tolist()
    ground = int(torch.randint(len(GROUNDS), (), generator=generator))
    offset = (6 * x - 3, 6 * y - 3)
    return Clip(emoji, motion, list(GROUNDS)[ground], 28 + 8 * size, 0.6 + 0.4 * reach, offset)


def path(one: Clip) -> torch.Tensor:
    """Where the emoji is in each frame: x, y, angle and size, [17, 4].

    In pixels from the middle of the picture, rightwards and downwards, in radians clockwise, and
    pixels. What moves goes straight at an even speed; what spins turns once; what grows or shrinks
    changes its size by a factor of 1.9 to 3; what bounces hops twice.
    """
    u = torch.linspace(0, 1, FRAMES)
    x, y = (torch.full_like(u, each) for each in one.offset)
    angle, size = torch.zeros_like(u), torch.full_like(u, one.size)
    way = one.reach * 13 * (1 - 2 * u)  # from one end to the other
    growth = (1 + 2 * one.reach) ** u / (1 + one.reach)
    match one.motion:
        case "moves left":
            x = x + way
        case "moves right":
            x = x - way
        case "moves up":
            y = y + way
        case "moves down":
            y = y - way
        case "spins":
            angle = 2 * math.pi * u
        case "grows":
            size = size * growth
        case "shrinks":
            size = size * growth.flip(0)
        case "bounces":
            y = y + one.reach * 13 * (1 - 2 * (2 * math.pi * u).sin().abs())
    return torch.stack((x, y, angle, size), dim=1)


def draw(one: Clip) -> torch.Tensor:
    """The frames of a clip, [3, 17, 64, 64] in [-1, 1]."""
    x, y, angle, size = path(one).view(FRAMES, 4, 1, 1).unbind(1)
    axis = torch.arange(SIZE) + 0.5 - SIZE / 2
    across, down = axis - x, axis[:, None] - y
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((across * cos + down * sin, down * cos - across * sin), dim=-1)
    grid = turned / (size[..., None] / 2)  # of the emoji's own square, -1 … 1
    tile = read_sheet()[EMOJI.index(one.emoji)].expand(FRAMES, -1, -1, -1)
    drawn = F.grid_sample(tile, grid, align_corners=False)
    colour, alpha = drawn[:, :3], drawn[:, 3:]
    ground = torch.tensor(GROUNDS[one.ground]).view(3, 1, 1) / 255
    frames = colour + (1 - alpha) * ground
    return frames.clamp(0, 1).mul(2).sub(1).transpose(0, 1).contiguous()


@lru_cache
def read_sheet() -> torch.Tensor:
    """The emoji in the order of `EMOJI`: RGB times alpha, and alpha, [40, 4, 32, 32] in [0, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(SHEET).convert("RGBA"))).float() / 255
    rows = sheet.view(-1, TILE, TILES_PER_ROW, TILE, 4).permute(0, 2, 4, 1, 3)
    tiles = rows.reshape(-1, 4, TILE, TILE)
    return torch.cat((tiles[:, :3] * tiles[:, 3:], tiles[:, 3:]), dim=1)


def load_video(folder: Path = KEPT) -> WanPipeline:
    """A trained pipeline, on the CPU in float32: the kept one, or that of another folder."""
    pipe = WanPipeline.from_pretrained(
        folder, **in_dtype(torch.float32), local_files_only=True, use_safetensors=True
    )
    pipe.transformer.eval()
    return pipe


def generate(pipe: WanPipeline, captions: list[str], steps: int | None = None) -> torch.Tensor:
    """Clips [B, 3, 17, 64, 64] in [0, 1] that the model draws, each from the seed of its number."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        captions,
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=steps or STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(number) for number in range(len(captions))],
        output_type="pt",
    ).frames.transpose(1, 2)


def save_strips(clips: torch.Tensor, path: Path) -> None:
    """A picture of some frames of clips [B, 3, 17, H, W] in [0, 1], one clip a row."""
    frames = clips[:, :, STRIP, :, :].float().cpu()
    rows = frames.permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    Image.fromarray((rows * 255).round().byte().numpy()).save(path)


def training_data() -> LatentDataset:
    """One clip of each pair of emoji and motion of the training list."""
    return _data("train", len(pairs("train")))


def held_out_data(part: HeldOut, count: int | None = None) -> LatentDataset:
    """The first clips of a held-out list; by default one of each of its pairs."""
    return _data(part, count or len(pairs(part)))


@lru_cache
def _data(side: Side, count: int) -> LatentDataset:
    return LatentDataset(*latents(load_video().vae, side, count))


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latents of clips [B, 3, T, H, W], of mean 0 and deviation 1 in each channel.

    Returns:
        [B, 8, (T - 1)/4 + 1, H/4, W/4].
    """
    mean, std = (
        torch.tensor(each, device=clips.device).view(1, -1, 1, 1, 1)
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(clips).latent_dist.mean - mean) / std


def latents(vae: AutoencoderKLWan, side: Side, count: int) -> tuple[torch.Tensor, list[str]]:
    """The first clips of a side as latents [count, 8, 5, 16, 16], and their captions."""
    clips = [clip(side, number) for number in range(count)]
    parts = [
        encode(vae, torch.stack([draw(one) for one in few]).to(vae.device))
        for few in batched(clips, 32)
    ]
    return torch.cat(parts), [one.caption for one in clips]


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
