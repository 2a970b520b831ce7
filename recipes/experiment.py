"""What the experiments share: teachers, students that are made once, tables that go on.

A row of a table is written as soon as it is measured, and not measured again while its `made`, a
hash of the teacher's weights and of every setting, is there. Students are kept beside it, in
`recipes/run/students`, so that experiments which need the same one train it once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from convfusion import (
    ConvertConfig,
    convert,
    load,
    mini,
    save,
    start_from_attention,
    status,
)
from convfusion.data import LatentDataset
from convfusion.demo import configure_distillation, spread
from convfusion.distill import DistillConfig, distill
from convfusion.distill.startup import draw_noised_batches
from convfusion.evaluate import epsilon_error
from convfusion.families import denoiser_of, family_of
from convfusion.fingerprint import fingerprint
from convfusion.mini import HeldOut
from convfusion.mixers import Mixer, Shared
from convfusion.mixers.tokens import Grid
from convfusion.operations import site_operations
from mini import fashion, large, video
from mini.joint import load_joint
from mini.pixart import load_pixart
from pages import add, rows
from reach import window_share

KEPT = Path(__file__).parent / "run"
JUDGED = 64  # held-out latents that ε-errors are measured on
START = "weighted by the queries that have each key"  # of `attention`: tells it from an earlier one


@dataclass(frozen=True)
class Teacher:
    """A mini model.

    Attributes:
        load: makes its pipeline, on the CPU in float32.
        training_data: that students are distilled on.
        held_out_data: that they are judged on, by the name of a list.
        latents: (height, width) of them, or (frames, height, width).
    """

    load: Callable[[], Any]
    training_data: Callable[[], LatentDataset]
    held_out_data: Callable[[HeldOut], LatentDataset]
    latents: Grid


TEACHERS = {
    "mini": Teacher(mini.load_teacher, mini.training_data, mini.held_out_data, (16, 16)),
    "pixart": Teacher(load_pixart, mini.training_data, mini.held_out_data, (16, 16)),
    "fashion": Teacher(
        fashion.load_fashion, fashion.training_data, lambda part: fashion.test_data(), (8, 8)
    ),
    "video": Teacher(video.load_video, video.training_data, video.held_out_data, (5, 16, 16)),
    "joint": Teacher(load_joint, mini.training_data, mini.held_out_data, (16, 16)),
    "large": Teacher(large.load_large, large.training_data, large.held_out_data, (32, 32)),
}
TEXT_TO_IMAGE = ("mini", "pixart")
SHIPPED = get_args(mini.Student)  # students that come with the embedded model


@dataclass(frozen=True)
class Recipe:
    """How a student is made of a teacher.

    Attributes:
        blocks: what is converted, and to which mixers.
        settings: of the distillation; None leaves the blocks as they start.
        started: whether blocks that are not distilled start from what their attention does on
            training pictures, as a distillation would start them, or from its weights alone.
    """

    blocks: ConvertConfig
    settings: DistillConfig | None
    started: bool = False

    def made(self, teacher: str) -> str:
        """A hash of the teacher's weights, of all settings, and of the start that they name."""
        settings = asdict(self.settings) if self.settings else None
        measured = self.settings.start == "attention" if self.settings else self.started
        start = [START] if measured else []
        return digest(weights_of(teacher), self.blocks.to_dict(), settings, *start)


def recipe(blocks: ConvertConfig, steps: int, seed: int = 0, **settings: Any) -> Recipe:
    """The demo's distillation with other blocks, and other settings where some are named.

    In bfloat16, which a CPU of today trains faster. Mixers that can start from what the attention
    does, measured on training pictures, start so.
    """
    starts = any(map(starts_measured, blocks.sites.values()))
    chosen = {"start": "attention" if starts else "converted", "autocast": "bf16", **settings}
    config = DistillConfig(**{**vars(configure_distillation(steps, seed)), **chosen})
    return Recipe(ConvertConfig(blocks.sites, seed=seed), config)


def starts_measured(mixer: Mixer) -> bool:
    """Whether a mixer has a start that is measured."""
    with torch.device("meta"):
        if isinstance(mixer, Shared):  # as where text and image share an attention
            return mixer.build_joint(64, 4).has_measured_start
        return mixer.build(64, 4).has_measured_start


def student(teacher: str, made_by: Recipe) -> tuple[Any, float]:
    """The pipeline of a student and the seconds that its distillation took, now or then."""
    folder = student_folder(teacher, made_by)
    pipe = TEACHERS[teacher].load()
    load(pipe, folder)
    return pipe, json.loads((folder / "seconds.json").read_text())


def student_folder(teacher: str, made_by: Recipe) -> Path:
    """Where the blocks of a student lie; they are made unless they are there."""
    folder = KEPT / "students" / made_by.made(teacher)
    if (folder / "seconds.json").is_file():
        return folder
    pipe = TEACHERS[teacher].load()
    unfused(pipe)
    convert(pipe, made_by.blocks)
    data = TEACHERS[teacher].training_data()
    started = time.perf_counter()
    if made_by.settings is not None:
        distill(pipe, data, made_by.settings)
    elif made_by.started:
        start_from_attention(pipe, draw_noised_batches(pipe, data))
    seconds = round(time.perf_counter() - started, 1)
    save(pipe, folder)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return folder


def shipped(name: mini.Student) -> tuple[Callable[[], Any], str]:
    """A student that comes with the embedded model, and what tells it from others."""
    maker = partial(mini.load_student, name)
    return maker, digest("shipped", fingerprint(denoiser_of(maker())))


def unfused(pipe: Any) -> None:
    """Attention as products and a softmax: on a CPU faster to train than the fused one.

    Joint attention, which has processors of its own, is left as it is.
    """
    for module in denoiser_of(pipe).modules():
        if isinstance(module, Attention) and isinstance(module.processor, AttnProcessor2_0):
            module.set_processor(AttnProcessor())


class Remembering:
    """The `forward` of a denoiser that predicts the same latents at the same time once.

    Args:
        model: called with keywords alone.
    """

    def __init__(self, model: Any) -> None:
        self.forward, self.family = model.forward, family_of(model)
        self.known: dict[float, tuple[torch.Tensor, Any]] = {}

    def __call__(self, **told: Any) -> Any:
        noisy, step = told[self.family.latents], float(told[self.family.times][0])
        if step not in self.known or not torch.equal(self.known[step][0], noisy):
            self.known[step] = (noisy, self.forward(**told))
        return self.known[step][1]


@cache
def judge(teacher: str, part: HeldOut) -> tuple[Any, LatentDataset]:
    """A teacher's denoiser, and the held-out latents that its students are judged on."""
    held_out = spread(TEACHERS[teacher].held_out_data(part), JUDGED)
    model = denoiser_of(TEACHERS[teacher].load())
    model.forward = Remembering(model)
    return model, held_out


def judged(teacher: str, made_by: Recipe, part: HeldOut = "choice") -> dict[str, Any]:
    """A student's ε-error on a list of pictures that no training saw, and what it costs."""
    pipe, seconds = student(teacher, made_by)
    costs = site_operations(pipe, TEACHERS[teacher].latents).values()
    whole, held_out = judge(teacher, part)
    error = epsilon_error(pipe, whole, held_out.latents, held_out.captions)
    return {
        "epsilon_error": f"{error:.4e}",
        "parameters": sum(site.mixer_parameters for site in status(pipe).sites),
        "operations": sum(own for _, own in costs),
        "attention_operations": sum(attention for attention, _ in costs),
        "window_share": f"{window_share(pipe, TEACHERS[teacher].latents):.4f}",
        "seconds": seconds,
    }


class Table:
    """A CSV in `results/` whose rows are written one by one and found again.

    Args:
        name: of the file.
        keys: the columns that tell rows apart.
        held_out: the list of held-out pictures that it rests on, one more such column.
    """

    def __init__(self, name: str, keys: Iterable[str], held_out: HeldOut | None = None) -> None:
        self.name, self.keys = name, tuple(keys)
        self.fixed = {"held_out": held_out} if held_out else {}

    def once(self, measure: Callable[[], dict[str, Any]], *key: Any) -> dict[str, str]:
        """The row with this key, which is measured and written unless it is there."""
        wanted = dict(zip(self.keys, map(str, key), strict=True)) | self.fixed
        for row in rows(self.name):
            if wanted.items() <= row.items():
                return row
        found = wanted | {name: str(value) for name, value in measure().items()}
        add(self.name, found)
        print(*found.values(), flush=True)
        return found


@cache
def weights_of(teacher: str) -> str:
    """Fingerprint of a teacher's denoiser."""
    return fingerprint(denoiser_of(TEACHERS[teacher].load()))


def digest(*facts: Any) -> str:
    """Twelve digits that stand for JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
