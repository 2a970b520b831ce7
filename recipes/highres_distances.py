"""How far sets of large pictures are from pictures at the model's own size, and ε-errors there.

The commands `distances` and `errors` of `recipes/highres.py`. The mini teacher and student draw the
same held-out prompts at their own size, and at 2 and 4 times it: by the ladder, and at once. Shrunk
to the model's own size, each set is compared with the held-out pictures, and with the teacher's own
at other seeds. Shrinking hides what is fine: the distances tell of layout, objects and colours.
Pictures are kept in `out/highres`, so that a run that stops goes on.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convfusion import mini
from convfusion.data.pictures import encode_pictures
from convfusion.demo import spread
from convfusion.evaluate import (
    TIMESTEPS,
    epsilon_error,
    frechet_distance,
    kernel_distance,
    open_extractor,
    plan_evaluation,
)
from convfusion.evaluate.pair import teacher_denoiser
from convfusion.evaluate.real import decoded
from convfusion.evaluate.settings import EvaluationSettings
from convfusion.families import denoiser_of
from convfusion.files import write_picture
from convfusion.fingerprint import fingerprint
from convfusion.highres import Ladder, highres
from pages import ROOT, add, has

FILE, ERRORS = "highres_distances.csv", "highres_errors.csv"
OWN = 64  # pixels along a side
STEPS = 15
LADDERS = {
    "own size": Ladder(),
    "ladder": Ladder(strength=mini.STRENGTH),
    "ladder, strength 0.3, guidance 3": Ladder(strength=0.3, guidance=mini.GUIDANCE),
    "at once": Ladder(direct=True),
}
LOAD = {"teacher": mini.load_teacher, "student": mini.load_student}
BOTH, STUDENT = ("teacher", "student"), ("student",)
SETS = (  # side, way, who draws, and of how many prompts one: 4 times the size takes long
    (OWN, "own size", BOTH, 1),
    (2 * OWN, "ladder", BOTH, 1),
    (4 * OWN, "ladder", BOTH, 1),
    (2 * OWN, "at once", BOTH, 1),
    (4 * OWN, "ladder, strength 0.3, guidance 3", STUDENT, 2),
    (4 * OWN, "at once", BOTH, 2),
)


def distances(args: argparse.Namespace) -> None:
    """One row for each set and reference that is not in the table yet."""
    held_out = mini.held_out_data("results")
    settings = plan_evaluation(
        list(held_out.captions), args.samples, 0, steps=STEPS, guidance=mini.GUIDANCE
    )
    others = replace(settings, seeds=settings.other_seeds)
    extractor, teacher = open_extractor(), mini.load_teacher()
    references = {
        "held-out pictures": extractor(decoded(teacher, held_out, "", (OWN, OWN))),
        "teacher's, other seeds": extractor(drawn(teacher, others, OWN, "own size", args.work)),
    }
    for side, way, models, part in SETS:
        chosen = replace(settings, prompts=settings.prompts[::part], seeds=settings.seeds[::part])
        for name in models:
            pipe = LOAD[name]()
            key = {"side": str(side), "way": way, "model": name, "samples": str(len(chosen))}
            key |= {"weights": fingerprint(denoiser_of(pipe)), "held_out": "results"}
            if has(FILE, key):
                continue
            found = extractor(drawn(pipe, chosen, side, way, args.work)).features
            for reference, seen in references.items():
                kernel = kernel_distance(found, seen.features)
                row = key | {
                    "reference": reference,
                    "reference_samples": len(seen.features),
                    "kernel": f"{kernel.value:.5f}",
                    "kernel_error": f"{kernel.error:.5f}",
                    "frechet": f"{frechet_distance(found, seen.features):.4f}",
                    "network": extractor.name,
                }
                if not args.dry:
                    add(FILE, row)
                print(*row.values(), flush=True)


def drawn(
    pipe: Any, settings: EvaluationSettings, side: int, way: str, work: Path
) -> Iterator[Image.Image]:
    """A set, shrunk to the model's own size; what is drawn already is read."""
    said = repr(
        (side, LADDERS[way], settings.steps, settings.guidance, fingerprint(denoiser_of(pipe)))
    )
    folder = work / hashlib.sha256(said.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for prompt, seed in zip(settings.prompts, settings.seeds, strict=True):
        path = folder / f"{seed:05d} {prompt[:80]}.png"
        if not path.is_file():
            [image] = highres(
                pipe, [prompt], (side, side), seeds=[seed], steps=settings.steps,
                guidance=settings.guidance, ladder=LADDERS[way],
            )  # fmt: skip
            write_picture(path, image)
        with Image.open(path, formats=("PNG",)) as file:
            yield file.convert("RGB").resize((OWN, OWN), Image.Resampling.BOX)


def errors(args: argparse.Namespace) -> None:
    """ε-errors of the student on held-out pictures, enlarged by Lanczos, at every size."""
    pipe = mini.load_student()
    data = spread(mini.held_out_data("results"), args.samples)
    teacher = teacher_denoiser(pipe)
    images = list(decoded(pipe, data, "", (OWN, OWN)))
    for side in (OWN, 2 * OWN, 4 * OWN):
        key = {"side": str(side), "samples": str(args.samples)}
        key |= {"weights": fingerprint(denoiser_of(pipe)), "held_out": "results"}
        if has(ERRORS, key):
            continue
        large = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images]
        latents = encode_pictures(pipe.vae, np.stack([np.asarray(each) for each in large]))
        found = {
            name: epsilon_error(
                pipe, teacher, latents, data.captions, timesteps=steps, batch_size=4
            )
            for name, steps in (("error", TIMESTEPS), ("error_late", TIMESTEPS[:3]))
        }
        row = key | {name: f"{error:.4e}" for name, error in found.items()}
        add(ERRORS, row)
        print(*row.values(), flush=True)


def add_commands(commands: Any) -> None:
    """`distances` and `errors` for a command line."""
    other = commands.add_parser("errors")
    other.set_defaults(run=errors)
    other.add_argument("--samples", type=int, default=8)
    one = commands.add_parser("distances")
    one.set_defaults(run=distances)
    one.add_argument("--samples", type=int, default=24)
    one.add_argument("--dry", action="store_true", help="print, but write no row")
    one.add_argument("--work", type=Path, default=ROOT / "out" / "highres")
