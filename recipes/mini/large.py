"""The fourth mini model: the embedded one at 128 pixels, its largest grid 32×32 tokens.

The same layout, autoencoder, text encoder and captions; of the UNet only the transformer blocks
are others, which `large_teacher.py` trained on latents 4×32×32. They lie in `large/` beside this
file in float16, with latents of training and of held-out pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from convfusion import ConvFusionError, mini
from convfusion.data import LatentDataset
from convfusion.files import read_tensors
from convfusion.mini import HeldOut

KEPT = Path(__file__).parent / "large"
SAMPLE_SIZE = 32  # side of its latents


def load_large() -> StableDiffusionPipeline:
    """The trained pipeline, on the CPU in float32; it draws 128×128 pixels.

    Raises:
        ConvFusionError: the embedded teacher is not the one that it was trained from.
    """
    base = read_facts()["base"]
    if base != mini.teacher_hash():
        raise ConvFusionError(
            f"{KEPT} is trained from another teacher than the embedded one: its base is "
            f"{base[:12]}, here is {mini.teacher_hash()[:12]}"
        )
    pipe = mini.load_teacher()
    put_blocks(pipe, read_tensors(KEPT / "blocks.safetensors"))
    return pipe


def put_blocks(pipe: StableDiffusionPipeline, tensors: dict[str, torch.Tensor]) -> None:
    """Copy trained blocks into the embedded teacher, whose own size is then 128 pixels."""
    own = pipe.unet.state_dict()
    for name in block_names(pipe.unet):
        own[name].copy_(tensors[name])
    pipe.unet.register_to_config(sample_size=SAMPLE_SIZE)


def block_names(unet: torch.nn.Module) -> list[str]:
    """Names of the tensors of all transformer blocks."""
    return [name for name in unet.state_dict() if ".transformer_blocks." in name]


def read_facts() -> dict[str, Any]:
    """What is noted of the training: its base, steps, pictures, losses and captions."""
    return json.loads((KEPT / "large.json").read_text(encoding="utf-8"))


def training_data() -> LatentDataset:
    """Latents [192, 4, 32, 32] and captions of a part of the training pictures."""
    return _read("train")


def held_out_data(part: HeldOut) -> LatentDataset:
    """64 latents [4, 32, 32] of a list of the embedded model's, evenly spread, and captions."""
    return _read(part)


def _read(side: str) -> LatentDataset:
    latents = read_tensors(KEPT / "latents.safetensors")[side]
    return LatentDataset(latents.float(), read_facts()["captions"][side])
