"""What the small joint teacher draws where its image attends to itself by something cheaper.

`python recipes/joint.py` replaces what goes from image to image in all six attentions of the small
Stable Diffusion 3, which its text shares: by nothing, by ΔConvBlocks on the values with three ways
to tell the image's share of a softmax, and by halo blocks with the text in their softmax. Each is
measured as it starts, and distilled for 100 steps except where nothing can learn; the best of
either kind with three seeds. Errors of the velocity and how close pictures are to the teacher's
from equal seeds go to `results/joint.csv`, on pictures and captions of the list `results`.
`--picture` draws pictures below each other instead, to `docs/images/joint.png`, and `--text`
measures what share of each attention goes to the text, for `results/joint_text.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image

from convfusion import DeltaConv, status, uniform
from convfusion.analysis import AnalysisConfig, analyze
from convfusion.demo import spread
from convfusion.evaluate import epsilon_error
from convfusion.evaluate.images import mean_psnr
from convfusion.generate import generate
from convfusion.mixers import Halo, Mixer, Removed, Shared
from convfusion.operations import site_operations
from experiment import TEACHERS, Recipe, Table, judge, recipe, student
from mini.joint import GUIDANCE, SIZE
from pages import ROOT, write

NOTHING = "nothing"
CONSTANT, PREDICTED, CELLS = (
    f"ΔConvBlock, {share}" for share in ("constant share", "predicted share", "share by cells")
)
HALO_16, HALO_64, HALO_12 = (
    f"halo block, {sees}" for sees in ("8×8 and 16 cells", "8×8 and 64 cells", "12×12 and 64 cells")
)
BLOCKS: dict[str, Mixer] = {
    NOTHING: Removed(),
    CONSTANT: Shared(DeltaConv(), "constant"),
    PREDICTED: Shared(DeltaConv(), "predicted"),
    CELLS: Shared(DeltaConv(), "cells"),
    HALO_16: Halo(block=4, window=8, cells=4, key_ratio=1.0, value_ratio=1.0),
    HALO_64: Halo(block=4, window=8, cells=8, key_ratio=1.0, value_ratio=1.0),
    HALO_12: Halo(block=4, window=12, cells=8, key_ratio=1.0, value_ratio=1.0),
}
# On the list `choice`, after 60 steps on an earlier state of the teacher: the best of 5e-3, 2e-2,
# 5e-2 for halo blocks of 64 cells, of 5e-3 and 2e-2 for ΔConvBlocks with a predicted share.
RATES = {CONSTANT: 5e-3, PREDICTED: 5e-3, CELLS: 5e-3, HALO_16: 5e-2, HALO_64: 5e-2, HALO_12: 5e-2}
BEST = (PREDICTED, HALO_64)  # with three seeds
STEPS, BATCH = 100, 16
DRAWN, DRAWING_STEPS = 16, 12  # pictures that are compared, and their steps
SHOWN = 8  # pictures of the figure
TABLE = Table("joint.csv", ("blocks", "seed", "steps", "rate", "made"), "results")
PICTURE = ROOT / "docs" / "images" / "joint.png"


def how(name: str, steps: int, seed: int) -> Recipe:
    """How a student is made; without steps, blocks as they start."""
    blocks = uniform(BLOCKS[name])
    if not steps:
        return Recipe(blocks, None, started=not isinstance(BLOCKS[name], Removed | Halo))
    return recipe(blocks, steps, seed, learning_rate=RATES[name], batch_size=BATCH)


def rows() -> Iterator[tuple[str, int, int]]:
    """Name, seed and steps of every row, those first that say most."""
    yield from ((name, 0, STEPS) for name in BEST)
    yield from ((name, 0, 0) for name in BLOCKS)
    yield CONSTANT, 0, STEPS
    yield from ((name, seed, STEPS) for seed in (1, 2) for name in BEST)
    yield from ((name, 0, STEPS) for name in RATES if name not in (*BEST, CONSTANT))


@cache
def draw_teacher() -> list[Any]:
    return draw(TEACHERS["joint"].load())


def draw(pipe: Any) -> list[Image.Image]:
    """Pictures of captions of the list `results`, from equal seeds."""
    prompts = spread(TEACHERS["joint"].held_out_data("results"), DRAWN).captions
    return generate(
        pipe,
        prompts,
        steps=DRAWING_STEPS,
        guidance=GUIDANCE,
        size=(SIZE, SIZE),
        batch_size=DRAWN,
        progress=False,
    )


def measure(made_by: Recipe) -> dict[str, Any]:
    pipe, seconds = student("joint", made_by)
    costs = site_operations(pipe, TEACHERS["joint"].latents).values()
    whole, held_out = judge("joint", "results")
    error = epsilon_error(pipe, whole, held_out.latents, held_out.captions)
    close = mean_psnr(draw(pipe), draw_teacher())
    return {
        "velocity_error": f"{error:.4e}",
        "psnr": f"{close.value:.2f}",
        "psnr_error": f"{close.error:.2f}",
        "parameters": sum(site.mixer_parameters for site in status(pipe).sites),
        "operations": sum(own for _, own in costs),
        "attention_operations": sum(attention for attention, _ in costs),
        "seconds": seconds,
    }


def measure_text() -> None:
    """What share of each attention goes to the text, at five steps of a drawing."""
    pipe = TEACHERS["joint"].load()
    prompts = spread(TEACHERS["joint"].held_out_data("results"), DRAWN).captions
    settings = AnalysisConfig(steps=DRAWING_STEPS, guidance=GUIDANCE, size=(SIZE, SIZE))
    rows = []
    for number, site in enumerate(analyze(pipe, prompts, settings).sites):
        text = site.text
        assert text is not None
        shares = {f"t={time:.0f}": share for time, share in text.timesteps.items()}
        found = {
            "share": text.share,
            "uniform": text.uniform_share,
            "padding": text.padding,
            "least_head": min(text.heads),
            "most_head": max(text.heads),
            **shares,
        }
        rows.append({"layer": number} | {name: f"{value:.4f}" for name, value in found.items()})
    write("joint_text.csv", rows)


def save_picture() -> None:
    """Pictures of the teacher, and below each other those of four kinds of students."""
    sides = [draw_teacher()]
    for name, steps in ((HALO_64, STEPS), (HALO_64, 0), (PREDICTED, STEPS), (NOTHING, 0)):
        sides.append(draw(student("joint", how(name, steps, 0))[0]))
    gap = 4
    whole = np.full((len(sides) * (SIZE + gap) - gap, SHOWN * (SIZE + gap) - gap, 3), 255, np.uint8)
    for row, side in enumerate(sides):
        for column, image in enumerate(side[:SHOWN]):
            top, left = row * (SIZE + gap), column * (SIZE + gap)
            whole[top : top + SIZE, left : left + SIZE] = np.asarray(image)
    Image.fromarray(whole).resize((whole.shape[1] * 2, whole.shape[0] * 2), 0).save(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--text", action="store_true", help="what goes to the text")
    args = parser.parse_args()
    if args.picture:
        save_picture()
    elif args.text:
        measure_text()
    else:
        for name, seed, steps in rows():
            made_by = how(name, steps, seed)
            rate = RATES[name] if steps else 0
            TABLE.once(partial(measure, made_by), name, seed, steps, rate, made_by.made("joint"))


if __name__ == "__main__":
    main()
