"""Token mixers under one recipe: the same teacher, data, steps and seeds.

`python recipes/rivals.py` converts each mini model with every token mixer in turn, distils it like
the demo does, and measures the ε-error on names that no training saw (`results/rivals.csv`). Each
mixer starts from the attention it replaces as far as its kind allows. With `--steps 0` nothing is
trained: the mixers as they start. Some draw (`--samples`): `results/rivals_pictures.csv` has the
distances of their pictures to real ones and to the teacher's from other seeds, beside those of the
teacher itself.

`python recipes/rivals.py --seconds` does nothing but time them, in turn, on a machine that has
nothing else to do (`results/rivals_seconds.csv`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from convfusion import ConvertConfig, DeltaConv, convert, mini, uniform
from convfusion.bench.timing import describe_machine, time_interleaved
from convfusion.generate import generate
from convfusion.mixers import (
    Circular,
    Depthwise,
    GeneralisedLinear,
    Halo,
    MeanOnly,
    Mixer,
    Neighbourhood,
    Pooled,
    Removed,
)
from experiment import (
    TEACHERS,
    TEXT_TO_IMAGE,
    Recipe,
    Table,
    judged,
    recipe,
    starts_measured,
    student,
    weights_of,
)
from pages import ROOT, has
from pictures import Drawn, distances, extract_features, real_pictures

OURS, HALO = "ΔConvBlock", "halo, r 1/4, n 1/2"
WINDOW = "7×7 neighbourhood attention"
RIVALS: dict[str, Mixer] = {
    OURS: DeltaConv(),
    HALO: Halo(),
    "halo, r 1/4, n 1/2, 64 cells": Halo(cells=8),
    "halo, r 1/2, n 1/2": Halo(key_ratio=0.5),
    "halo, r 1/8, n 3/8, window 6": Halo(window=6, key_ratio=0.125, value_ratio=0.375),
    WINDOW: Neighbourhood(7),
    "13×13 neighbourhood attention": Neighbourhood(13),
    "pooled keys and values": Pooled(),
    "LinFusion's linear attention": GeneralisedLinear(),
    "one 3×3 depthwise convolution": Depthwise(),
    "nothing": Removed(),
    "circle of radius 4 and a mean token": Circular(4),
    "ΔConvBlock, ratio 2, K 9, 3 stages": DeltaConv(kernel_size=9, stages=3, ratio=2.0),
    "its convolutions alone": DeltaConv(mean_branch=False),
    "one scale": DeltaConv(stages=1),
    "the mean alone": MeanOnly(),
}
BY_KERNEL = "neighbourhood attention as wide as the recommended kernels"
NAMES = (*RIVALS, BY_KERNEL)
SEEDED = (OURS, HALO, WINDOW)  # run with two further seeds
UNTRAINED = (OURS, HALO, "halo, r 1/2, n 1/2", WINDOW, "nothing")  # measured as they start, too
DRAWN = (OURS, HALO, WINDOW, "LinFusion's linear attention", "nothing")  # their pictures, too
TRAINED = Table(
    "rivals.csv", ["model", "mixer", "learning_rate", "seed", "steps", "made"], "results"
)
TIMED = Table("rivals_seconds.csv", ["model", "mixer"])
LOOKED = Table("rivals_pictures.csv", ["model", "mixer", "reference", "samples", "made"], "results")


def rate_of(teacher: str, name: str) -> float:
    """The learning rate of a rival, none of which was chosen on the list `results`.

    All but the halo blocks once ran at both 0.02 and 0.002, on older pictures, and 0.02 was the
    better one for what convolves or sums; on a transformer, not for the two largest of these. Those
    of the halo blocks are from single sites on training pictures.
    """
    mixer = RIVALS.get(name, Neighbourhood())
    attends = isinstance(mixer, Neighbourhood | Circular | Pooled)
    transformer = teacher in ("pixart", "fashion")
    if isinstance(mixer, Halo):
        return 2e-3 if transformer else 5e-3 if mixer.key_ratio >= 0.25 else 1e-2
    large = isinstance(mixer, GeneralisedLinear) or getattr(mixer, "ratio", 0) > 1
    return 2e-3 if attends or (transformer and large) else 2e-2


def blocks_of(teacher: str, name: str) -> ConvertConfig:
    """What a rival puts at each site."""
    if name != BY_KERNEL:
        return uniform(RIVALS[name])
    found = ConvertConfig.load(ROOT / "docs" / f"analysis-{teacher}" / "kernels.json")
    sites = {path: Neighbourhood(block.kernel_size) for path, block in found.sites.items()}
    return ConvertConfig(sites)


def rival(teacher: str, name: str, seed: int, steps: int) -> Recipe:
    """How a rival is made; without steps, it is left as it starts."""
    blocks = blocks_of(teacher, name)
    if name == "nothing" or not steps:
        started = any(map(starts_measured, blocks.sites.values()))
        return Recipe(blocks, None, started)
    return recipe(blocks, steps, seed, learning_rate=rate_of(teacher, name))


def measure(teacher: str, name: str, seed: int, steps: int) -> None:
    """Write the row of a run unless it is there."""
    how = rival(teacher, name, seed, steps)
    rate = how.settings.learning_rate if how.settings else 0
    key = (teacher, name, f"{rate:g}", seed, steps, how.made(teacher))
    TRAINED.once(lambda: judged(teacher, how, "results"), *key)


def draw(teacher: str, chosen: dict[str, Recipe], samples: int) -> None:
    """Rows of the pictures of the teacher and of some students."""
    own, other = Drawn(samples), Drawn(samples, first_seed=samples)
    stock = TEACHERS[teacher].load
    sets = {
        "real": real_pictures(stock()),
        "teacher": extract_features(stock, weights_of(teacher), other),
    }
    whole = extract_features(stock, weights_of(teacher), own)
    makers = {"the teacher": (stock, weights_of(teacher))}
    for name, how in chosen.items():
        makers[name] = (lambda how=how: student(teacher, how)[0], how.made(teacher))
    for name, (maker, made) in makers.items():
        for reference, features in sets.items():
            LOOKED.once(
                lambda maker=maker, made=made, features=features, reference=reference: distances(
                    extract_features(maker, made, own),
                    features,
                    whole,
                    paired=reference == "teacher",
                ),
                *(teacher, name, reference, samples, own.made(made)),
            )


def time_all(teacher: str, pictures: int = 8, rounds: int = 3) -> None:
    """Rows of the seconds a picture takes with each mixer; training changes nothing about them.

    Rows of another session stand for themselves, so what is there already is not added to.
    """
    if has(TIMED.name, {"model": teacher}):
        return
    pipes: dict[str, Any] = {"the teacher": TEACHERS[teacher].load()}
    for name in NAMES:
        pipes[name] = TEACHERS[teacher].load()
        convert(pipes[name], blocks_of(teacher, name))
    prompts = mini.held_out_data("results").captions[:pictures]
    calls = {name: partial(generate, pipe, prompts) for name, pipe in pipes.items()}
    cpu = torch.device("cpu")
    for name, timing in time_interleaved(calls, cpu, rounds).items():
        seconds = {
            "seconds_per_picture": f"{timing.median / pictures:.4f}",
            "least": f"{min(timing.seconds) / pictures:.4f}",
            "most": f"{max(timing.seconds) / pictures:.4f}",
            **describe_machine(cpu),
        }
        TIMED.once(lambda seconds=seconds: seconds, teacher, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=TEACHERS, default=TEXT_TO_IMAGE)
    parser.add_argument("--mixers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[0, 100], help="of each; 0: as they start"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="beside the first")
    parser.add_argument("--samples", type=int, default=245, help="pictures of a set; 0: none")
    parser.add_argument("--seconds", action="store_true", help="time them, and nothing else")
    args = parser.parse_args()
    if args.samples:
        Drawn(args.samples).plan()  # says now if they cannot be drawn
    for teacher in args.models:
        if args.seconds:
            time_all(teacher)
            continue
        for steps in args.steps:
            run(teacher, args.mixers, steps, args.seeds)
            if args.samples and steps:
                chosen = [name for name in DRAWN if name in args.mixers]
                how = {name: rival(teacher, name, 0, steps) for name in chosen}
                draw(teacher, how, args.samples)


def run(teacher: str, names: Sequence[str], steps: int, seeds: Sequence[int]) -> None:
    """Rows of ε-errors: of one seed, and of further ones where rows are compared closely."""
    for name in names:
        if steps:
            for seed in (0, *seeds) if name in SEEDED else (0,):
                measure(teacher, name, seed, steps)
        elif name in UNTRAINED:
            measure(teacher, name, 0, 0)


if __name__ == "__main__":
    main()
