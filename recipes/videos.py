"""What the video teacher draws without a part or all of its self-attention.

`python recipes/videos.py` ranks the layers of the small Wan by what replacing one alone costs, and
replaces the cheapest two, three and all six of them: by nothing, by halo blocks that are set from
the attention and not trained, and by halo blocks and ΔConvBlocks that are distilled for 100 steps
(three seeds where all are replaced). Errors of the velocity, how close clips are to the teacher's
from equal seeds, and their flicker beside the teacher's own go to `results/videos.csv`, all on
captions of the list `results`; the ranking is made on the list `choice`. `--picture` draws clips
below each other instead, to `docs/images/videos.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from convfusion import ConvertConfig, DeltaConv, convert, uniform
from convfusion.distill.partial import site_costs
from convfusion.evaluate import epsilon_error
from convfusion.evaluate.images import mean_clip_psnr
from convfusion.evaluate.motion import measure_flicker, ratio_of_means
from convfusion.families import denoiser_of
from convfusion.mixers import Halo, Mixer, Removed
from convfusion.operations import site_operations
from convfusion.surgery import select_sites
from experiment import TEACHERS, Recipe, Table, recipe, student
from mini.video import clip, generate, held_out_data, save_strips
from pages import ROOT

OURS, HALO, UNTRAINED, NOTHING = "ΔConvBlock", "halo block", "halo block, not trained", "nothing"
BLOCKS: dict[str, Mixer] = {
    NOTHING: Removed(),
    UNTRAINED: Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(2, 4, 4)),
    HALO: Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(2, 4, 4)),
    OURS: DeltaConv(kernel_size=7, frame_kernel_size=3, first_frame_branch=True),
}
# On the list `choice` the best of 7e-4, 2e-3 and 5e-3, and of 5e-3 and 1e-2.
RATES = {HALO: 2e-3, OURS: 5e-3}
COUNTS, STEPS, BATCH = (2, 3, 6), 100, 4
JUDGED, DRAWN, DRAWING_STEPS = 16, 8, 10  # clips of velocity errors, and drawn ones; their steps
TABLE = Table("videos.csv", ("blocks", "layers", "seed", "steps", "made"), "results")
PICTURE = ROOT / "docs" / "images" / "videos.png"
SHOWN = 3  # clips of the picture


@cache
def rank_layers() -> list[str]:
    """Paths of the layers, the one first whose halo block alone costs least after stage 1."""
    pipe = TEACHERS["video"].load()
    trained = how(HALO, uniform(BLOCKS[HALO]), 24, 0)
    convert(pipe, trained.blocks)
    held_out = held_out_data("choice", JUDGED)
    costs = site_costs(pipe, TEACHERS["video"].training_data(), held_out, trained.settings)
    return costs.cheapest("epsilon")


def how(name: str, blocks: ConvertConfig, steps: int, seed: int) -> Recipe:
    """How a student is made; of a name that is not trained, what stands there as it starts."""
    if name not in RATES:
        return Recipe(blocks, None, started=name == UNTRAINED)
    return recipe(blocks, steps, seed, learning_rate=RATES[name], batch_size=BATCH)


def choose(name: str, count: int) -> ConvertConfig:
    """What is converted where so many layers are: those that are cheapest for halo blocks."""
    whole = uniform(BLOCKS[name])
    return whole if count == max(COUNTS) else select_sites(whole, sorted(rank_layers()[:count]))


def rows() -> Iterator[tuple[str, int, int, int]]:
    """Name, layers, seed and steps of every row, those first that say most."""
    for count in reversed(COUNTS):
        for seed in range(3 if count == max(COUNTS) else 1):
            for name in BLOCKS:
                if name in RATES or not seed:
                    yield name, count, seed, STEPS if name in RATES else 0


@cache
def draw_teacher() -> torch.Tensor:
    return draw(TEACHERS["video"].load())


def draw(pipe: Any) -> torch.Tensor:
    """Clips [8, 3, 17, 64, 64] of captions of the list `results`, from equal seeds."""
    captions = [clip("results", number).caption for number in range(0, 5 * DRAWN, 5)]
    return generate(pipe, captions, steps=DRAWING_STEPS)


def to_frames(clips: torch.Tensor) -> list[np.ndarray]:
    """Each clip as uint8 [T, H, W, 3]."""
    return [each.permute(1, 2, 3, 0).mul(255).round().byte().numpy() for each in clips]


def measure(made_by: Recipe) -> dict[str, Any]:
    pipe, seconds = student("video", made_by)
    held_out, teacher = held_out_data("results", JUDGED), TEACHERS["video"].load()
    error = epsilon_error(
        pipe, denoiser_of(teacher), held_out.latents, held_out.captions, batch_size=JUDGED
    )
    costs = site_operations(pipe, TEACHERS["video"].latents).values()
    clips, whole = to_frames(draw(pipe)), to_frames(draw_teacher())
    close = mean_clip_psnr(clips, whole)
    names = [str(number) for number in range(DRAWN)]
    flickers = [list(map(measure_flicker, each)) for each in (clips, whole)]
    flicker = ratio_of_means(*flickers, names)
    return {
        "velocity_error": f"{error:.4e}",
        "psnr": f"{close.value:.2f}",
        "psnr_error": f"{close.error:.2f}",
        "flicker_ratio": f"{flicker.value:.3f}",
        "flicker_ratio_error": f"{flicker.error:.3f}",
        "operations": sum(own for _, own in costs),
        "attention_operations": sum(attention for attention, _ in costs),
        "seconds": seconds,
    }


def save_picture() -> None:
    """Clips of the teacher and of each kind of student with all layers replaced."""
    sides = [draw_teacher()]
    for name in (HALO, OURS, UNTRAINED, NOTHING):
        steps = STEPS if name in RATES else 0
        sides.append(draw(student("video", how(name, choose(name, max(COUNTS)), steps, 0))[0]))
    save_strips(torch.stack([side[number] for number in range(SHOWN) for side in sides]), PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", action="store_true")
    args = parser.parse_args()
    if args.picture:
        save_picture()
        return
    for name, count, seed, steps in rows():
        made_by = how(name, choose(name, count), steps, seed)
        key = (name, count, seed, steps, made_by.made("video"))
        TABLE.once(partial(measure, made_by), *key)


if __name__ == "__main__":
    main()
