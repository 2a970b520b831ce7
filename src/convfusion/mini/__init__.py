"""The embedded model: a small text-to-image pipeline trained on emoji, and its distilled student.

A plain `StableDiffusionPipeline` for 64×64 pictures with seven self-attention sites. Captions
look like `waving hand sign, dark skin tone, noto`; the designs are `noto` and `twemoji`. One name
in ten was held out of all training, of the teacher and of the student.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from convfusion.checkpoint import load
from convfusion.checkpoint.pipelines import in_dtype
from convfusion.data.latents import LatentDataset
from convfusion.files import read_tensors

FOLDER = Path(__file__).parent
TEACHER, STUDENT, DATA = FOLDER / "teacher", FOLDER / "student", FOLDER / "data"
NAMES = ("mini", "mini-teacher")  # on the command line: with the student, and as it was trained
GUIDANCE = 3.0  # classifier-free guidance that its pictures look best with
STRENGTH = 0.1  # of a rung to a larger size: with more, it draws texture (docs/highres.md)


def load_teacher() -> Any:
    """The pretrained pipeline, on the CPU in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        TEACHER, local_files_only=True, use_safetensors=True, **in_dtype(torch.float32)
    )
    pipe.unet.eval()
    return pipe


def load_student() -> Any:
    """The same pipeline with the distilled ΔConvBlocks in place; its attention is kept."""
    pipe = load_teacher()
    load(pipe, STUDENT)
    return pipe


def training_data() -> LatentDataset:
    """Latents [P, 4, 16, 16] and captions of a part of the training pictures."""
    return _read("train")


def held_out_data() -> LatentDataset:
    """Latents and captions of names that neither teacher nor student has seen."""
    return _read("held_out")


def held_out_names() -> list[str]:
    """The names that were held out, one in ten."""
    return json.loads((DATA / "captions.json").read_text(encoding="utf-8"))["held_out_names"]


def teacher_hash() -> str:
    """SHA-256 over the teacher's weight files: names the teacher that a result rests on."""
    digest = hashlib.sha256()
    for file in sorted(TEACHER.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(side: str) -> LatentDataset:
    captions = json.loads((DATA / "captions.json").read_text(encoding="utf-8"))[side]
    latents = read_tensors(DATA / "latents.safetensors")[side]
    return LatentDataset(latents.float(), captions)
