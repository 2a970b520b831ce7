"""The third mini model: a class-conditional `DiTPipeline` on the photographs of Fashion-MNIST.

28×28 grey pictures of ten kinds of clothes, with a black edge of two pixels and three equal
channels: 32×32, in latents 8×8×4, in tokens 8×8. Eight blocks of width 144. The weights that
`fashion_teacher.py` trained lie in `fashion/` beside this file, in float16.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from PIL import Image

from convfusion.checkpoint.pipelines import in_dtype
from convfusion.data import LatentDataset
from convfusion.data.pictures import encode_pictures

KEPT = Path(__file__).parent / "fashion"
SOURCE = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CLASSES = (
    "T-shirt", "trousers", "pullover", "dress", "coat",
    "sandal", "shirt", "trainers", "bag", "ankle boot",
)  # fmt: skip
FILES = {"train": "train", "test": "t10k"}


def read_pictures(side: str) -> tuple[torch.Tensor, list[int]]:
    """The `train` or `test` pictures, uint8 [P, 3, 32, 32], and the class of each."""
    images = _read(f"{FILES[side]}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
    labels = _read(f"{FILES[side]}-labels-idx1-ubyte.gz", 8)
    return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels.tolist()


def _read(name: str, head: int) -> torch.Tensor:
    """The bytes of an IDX file after its head."""
    try:
        with gzip.open(SOURCE / name) as file:
            return torch.frombuffer(bytearray(file.read()[head:]), dtype=torch.uint8)
    except FileNotFoundError:
        raise SystemExit(
            f"{SOURCE / name} is not there: install dataset-fashion-mnist (Debian, Ubuntu), or "
            "name a folder with the four .gz files of Fashion-MNIST in FASHION_MNIST"
        ) from None


def load_fashion() -> DiTPipeline:
    """The trained pipeline, on the CPU in float32. It draws without guidance."""
    pipe = DiTPipeline.from_pretrained(
        KEPT,
        id2label=dict(enumerate(CLASSES)),  # which diffusers does not save
        **in_dtype(torch.float32),
        local_files_only=True,
        use_safetensors=True,
    )
    pipe.transformer.eval()
    return pipe


def pictures(side: str, count: int) -> list[Image.Image]:
    """The first pictures of a side."""
    images = read_pictures(side)[0][:count].permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in images]


@torch.no_grad()
def latents(side: str, count: int) -> LatentDataset:
    """The first pictures of a side as latents [count, 4, 8, 8], each with the name of its class."""
    images, labels = read_pictures(side)
    vae = load_fashion().vae
    parts = np.split(images[:count].permute(0, 2, 3, 1).numpy(), range(256, count, 256))
    encoded = torch.cat([encode_pictures(vae, part) for part in parts])
    return LatentDataset(encoded, [CLASSES[label] for label in labels[:count]])


def training_data() -> LatentDataset:
    return latents("train", 4096)


def test_data() -> LatentDataset:
    return latents("test", 512)
