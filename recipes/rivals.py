"""ΔConvBlocks and their rivals under one recipe: the same teacher, data, steps and seeds.

`python recipes/rivals.py` converts each mini model with every token mixer in turn, distils it like
the demo does, and measures the ε-error on names that no training saw (`results/rivals.csv`). Each
mixer starts from the attention it replaces as far as its kind allows, and runs at two learning
rates with seed 0; the better one is its own. The ΔConvBlock and the two best rivals run with two
further seeds. Then these, LinFusion's layers and the model without self-attention draw:
`results/rivals_pictures.csv` has the distances of their pictures to real ones and to the teacher's
from other seeds, beside those of the teacher itself.

`python recipes/rivals.py --seconds` does nothing but time them, in turn, on a machine that has
nothing else to do (`results/rivals_seconds.csv`).
"""

from __future__ import annotations

import argparse
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
    shipped,
    student,
    weights_of,
)
from pages import ROOT, has
from pictures import Drawn, distances, extract_features, real_pictures

OURS = "ΔConvBlock"
RIVALS: dict[str, Mixer] = {
    OURS: DeltaConv(),
    "ΔConvBlock, ratio 2, K 9, 3 stages": DeltaConv(kernel_size=9, stages=3, ratio=2.0),
    "its convolutions alone": DeltaConv(mean_branch=False),
    "one scale": DeltaConv(stages=1),
    "the mean alone": MeanOnly(),
    "one 3×3 depthwise convolution": Depthwise(),
    "LinFusion's linear attention": GeneralisedLinear(),
    "7×7 neighbourhood attention": Neighbourhood(7),
    "13×13 neighbourhood attention": Neighbourhood(13),
    "circle of radius 4 and a mean token": Circular(4),
    "pooled keys and values": Pooled(),
    "nothing": Removed(),
}
DELTA = [name for name, mixer in RIVALS.items() if isinstance(mixer, DeltaConv)]
BY_KERNEL = "neighbourhood attention as wide as the recommended kernels"
RATES = (2e-2, 2e-3)
TRAINED = Table(
    "rivals.csv", ["model", "mixer", "learning_rate", "seed", "steps", "made"], "choice"
)
TIMED = Table("rivals_seconds.csv", ["model", "mixer"])
LOOKED = Table("rivals_pictures.csv", ["model", "mixer", "reference", "samples", "made"], "results")


def blocks_of(teacher: str, name: str) -> ConvertConfig:
    """What a rival puts at each site."""
    if name != BY_KERNEL:
        return uniform(RIVALS[name])
    found = ConvertConfig.load(ROOT / "docs" / f"analysis-{teacher}" / "kernels.json")
    sites = {path: Neighbourhood(block.kernel_size) for path, block in found.sites.items()}
    return ConvertConfig(sites)


def rival(teacher: str, name: str, rate: float, seed: int, steps: int) -> Recipe:
    blocks = blocks_of(teacher, name)
    if name == "nothing":
        return Recipe(blocks, None)
    return recipe(blocks, steps, seed, learning_rate=rate)


def train(teacher: str, name: str, rate: float, seed: int, steps: int) -> dict[str, str]:
    """The row of a run."""
    how = rival(teacher, name, rate, seed, steps)
    key = (teacher, name, f"{rate:g}", seed, steps, how.made(teacher))
    return TRAINED.once(lambda: judged(teacher, how), *key)


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
    if teacher == "mini":
        makers["ΔConvBlocks as they are shipped"] = shipped("delta_conv")
        makers["halo blocks as they are shipped"] = shipped("near")
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
    for name in (*RIVALS, BY_KERNEL):
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
    parser.add_argument("--models", nargs="+", choices=TEXT_TO_IMAGE, default=TEXT_TO_IMAGE)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=245, help="pictures of a set; 0: none")
    parser.add_argument("--seconds", action="store_true", help="time them, and nothing else")
    args = parser.parse_args()
    if args.samples:
        Drawn(args.samples).plan()  # says now if they cannot be drawn
    for teacher in args.models:
        if args.seconds:
            time_all(teacher)
            continue
        best = {}
        for name in (*RIVALS, BY_KERNEL):
            rates = RATES if name != "nothing" else RATES[:1]
            rows = [train(teacher, name, rate, 0, args.steps) for rate in rates]
            best[name] = min(rows, key=error_of)
        others = [row for name, row in best.items() if name not in DELTA]
        shown = [best[OURS], *sorted(others, key=error_of)[:2]]
        for row in shown:
            for seed in (1, 2):
                train(teacher, row["mixer"], float(row["learning_rate"]), seed, args.steps)
        if args.samples:
            shown += [best[name] for name in ("LinFusion's linear attention", "nothing")]
            chosen = {
                row["mixer"]: rival(
                    teacher, row["mixer"], float(row["learning_rate"]), 0, args.steps
                )
                for row in shown
            }
            draw(teacher, chosen, args.samples)


def error_of(row: dict[str, str]) -> float:
    return float(row["epsilon_error"])


if __name__ == "__main__":
    main()
