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
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor

from convfusion import ConvertConfig, DeltaConv, convert, load, mini, save, status
from convfusion.data import LatentDataset
from convfusion.demo import configure_distillation, measure_error, spread
from convfusion.distill import DistillConfig, distill
from convfusion.families import denoiser_of
from convfusion.fingerprint import fingerprint
from convfusion.mini import HeldOut
from convfusion.operations import site_operations
from mini import fashion, large
from mini.pixart import load_pixart
from pages import add, rows

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
        latents: (height, width) of them.
    """

    load: Callable[[], Any]
    training_data: Callable[[], LatentDataset]
    held_out_data: Callable[[HeldOut], LatentDataset]
    latents: tuple[int, int]


TEACHERS = {
    "mini": Teacher(mini.load_teacher, mini.training_data, mini.held_out_data, (16, 16)),
    "pixart": Teacher(load_pixart, mini.training_data, mini.held_out_data, (16, 16)),
    "fashion": Teacher(
        fashion.load_fashion, fashion.training_data, lambda part: fashion.test_data(), (8, 8)
    ),
    "large": Teacher(large.load_large, large.training_data, large.held_out_data, (32, 32)),
}
TEXT_TO_IMAGE = ("mini", "pixart")


@dataclass(frozen=True)
class Recipe:
    """How a student is made of a teacher.

    Attributes:
        blocks: what is converted, and to which mixers.
        settings: of the distillation; None leaves the blocks as they are converted.
    """

    blocks: ConvertConfig
    settings: DistillConfig | None

    def made(self, teacher: str) -> str:
        """A hash of the teacher's weights, of all settings, and of the start that they name."""
        settings = asdict(self.settings) if self.settings else None
        start = [START] if self.settings and self.settings.start == "attention" else []
        return digest(weights_of(teacher), self.blocks.to_dict(), settings, *start)


def recipe(blocks: ConvertConfig, steps: int, seed: int = 0, **settings: Any) -> Recipe:
    """The demo's distillation with other blocks, and other settings where some are named.

    In bfloat16, which a CPU of today trains faster.
    """
    starts = all(isinstance(mixer, DeltaConv) for mixer in blocks.sites.values())
    chosen = {"start": "attention" if starts else "converted", "autocast": "bf16", **settings}
    config = DistillConfig(**{**vars(configure_distillation(steps, seed)), **chosen})
    return Recipe(ConvertConfig(blocks.sites, seed=seed), config)


def student(teacher: str, made_by: Recipe) -> tuple[Any, float]:
    """The pipeline of a student and the seconds that its distillation took, now or then."""
    folder = KEPT / "students" / made_by.made(teacher)
    pipe = TEACHERS[teacher].load()
    if (folder / "seconds.json").is_file():
        load(pipe, folder)
        return pipe, json.loads((folder / "seconds.json").read_text())
    unfused(pipe)
    convert(pipe, made_by.blocks)
    started = time.perf_counter()
    if made_by.settings is not None:
        distill(pipe, TEACHERS[teacher].training_data(), made_by.settings)
    seconds = round(time.perf_counter() - started, 1)
    save(pipe, folder)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return pipe, seconds


def shipped(name: mini.Student = "near") -> tuple[Callable[[], Any], str]:
    """A student that the embedded model comes with, and what tells it from others."""
    load_it = partial(mini.load_student, name)
    return load_it, digest("shipped", fingerprint(denoiser_of(load_it())))


def unfused(pipe: Any) -> None:
    """Attention as products and a softmax: on a CPU faster to train than the fused one."""
    for module in denoiser_of(pipe).modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def judged(teacher: str, made_by: Recipe, part: HeldOut = "choice") -> dict[str, Any]:
    """A student's ε-error on a list of pictures that no training saw, and what it costs."""
    pipe, seconds = student(teacher, made_by)
    costs = site_operations(pipe, TEACHERS[teacher].latents).values()
    held_out = spread(TEACHERS[teacher].held_out_data(part), JUDGED)
    return {
        "epsilon_error": f"{measure_error(pipe, held_out):.4e}",
        "parameters": sum(site.mixer_parameters for site in status(pipe).sites),
        "operations": sum(own for _, own in costs),
        "attention_operations": sum(attention for attention, _ in costs),
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
