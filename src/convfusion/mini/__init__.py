"""The embedded model: a small text-to-image pipeline trained on emoji, and two students of it.

A plain `StableDiffusionPipeline` for 64×64 pictures with seven self-attention sites. Captions
look like `waving hand sign, dark skin tone, noto`; the designs are `noto` and `twemoji`. One name
in ten was held out of all training, of the teacher and of the students.

Some names share a picture: twelve of the pictures held out were, pixel by pixel, pictures of
training names, and are gone. The others are two lists that never change: `choice`, on which
anything may be chosen, and `results`, on which the README's figures are measured and nothing is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

from convfusion.checkpoint import load
from convfusion.checkpoint.loading import in_dtype
from convfusion.checkpoint.named import STUDENTS
from convfusion.data.latents import LatentDataset
from convfusion.errors import ConvFusionError
from convfusion.files import read_tensors

FOLDER = Path(__file__).parent
TEACHER, DATA = FOLDER / "teacher", FOLDER / "data"
Student = Literal["near", "delta_conv"]
# By the name on the command line, the blocks that the model has; None is its own attention.
NAMES: dict[str, Student | None] = {
    "mini": "near",
    "mini-delta": "delta_conv",
    "mini-teacher": None,
}
GUIDANCE = 3.0  # classifier-free guidance that its pictures look best with
STRENGTH = 0.1  # of a rung to a larger size: with more, it draws texture (docs/highres.md)
HeldOut = Literal["choice", "results"]
FIRST = 382  # pictures held out as first packaged, by whose numbers the lists go
SEEN = (89, 94, *range(276, 286))  # of them, those that equal a picture of the training
CHOICE = {half * FIRST // 128 for half in range(128)} | {93}  # one in three; 93 equals 86, of them


def load_teacher() -> Any:
    """The pretrained pipeline, on the CPU in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        TEACHER, local_files_only=True, use_safetensors=True, **in_dtype(torch.float32)
    )
    pipe.unet.eval()
    return pipe


def load_student(name: Student = "near") -> Any:
    """The same pipeline with distilled blocks at every site; its attention is kept.

    Args:
        name: `near`, halo blocks, which draw almost what the teacher draws; or `delta_conv`, the
            paper's blocks, which take the fewest operations.

    Raises:
        ConvFusionError: there is no such student.
    """
    if name not in get_args(Student):
        raise ConvFusionError(
            f"there is no student {name!r}; there are {' and '.join(get_args(Student))}"
        )
    pipe = load_teacher()
    load(pipe, STUDENTS / name)
    return pipe


def training_data() -> LatentDataset:
    """Latents [P, 4, 16, 16] and captions of a part of the training pictures."""
    return _read("train")


def held_out_data(part: HeldOut | None = None) -> LatentDataset:
    """Latents and captions of names that neither the teacher nor a student has seen.

    Args:
        part: `choice`, 125 samples for whatever is chosen or tuned; `results`, 245 others for what
            is reported. None is both.

    Raises:
        ConvFusionError: there is no such list.
    """
    if part not in (None, *get_args(HeldOut)):
        raise ConvFusionError(
            f"there is no list {part!r}; there are {' and '.join(get_args(HeldOut))}"
        )
    data = _read("held_out")
    if part is None:
        return data
    kept = [number for number in range(FIRST) if number not in SEEN]
    picks = [i for i, number in enumerate(kept) if (number in CHOICE) == (part == "choice")]
    return LatentDataset(data.latents[picks], [data.captions[i] for i in picks])


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
