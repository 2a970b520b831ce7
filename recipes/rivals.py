"""ΔConvBlocks and their rivals under one recipe: the same teacher, data, steps and seeds.

`python recipes/rivals.py` converts each mini model with every token mixer in turn, distils it like
the demo does, and measures the ε-error on names that no training saw. Each mixer starts from the
attention it replaces as far as its kind allows, and runs at two learning rates with seed 0; the
better one is its own for the other seeds. Each run is a row of `results/rivals.csv` as soon as it
is done, and runs that are there already, for the same weights, are not done again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from convfusion import ConvertConfig, DeltaConv, convert, mini, status, uniform
from convfusion.adapters import denoiser_of
from convfusion.demo import distillation, error, spread
from convfusion.distill import distill
from convfusion.fingerprint import fingerprint
from convfusion.flops import site_flops
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
from mini.pixart import load_pixart

RESULTS = Path(__file__).parent.parent / "results" / "rivals.csv"
MODELS: dict[str, Callable[[], Any]] = {"mini": mini.load_teacher, "pixart": load_pixart}
RIVALS: dict[str, Mixer] = {
    "ΔConvBlock": DeltaConv(),
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
RATES = (2e-2, 2e-3)
COLUMNS = [
    "model",
    "mixer",
    "learning_rate",
    "seed",
    "steps",
    "epsilon_error",
    "parameters",
    "operations",
    "attention_operations",
    "seconds",
    "weights",
]


def measured(name: str, rival: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Convert, distil and measure one rival; its row."""
    pipe = MODELS[name]()
    weights = fingerprint(denoiser_of(pipe))
    mixer = RIVALS[rival]
    convert(pipe, ConvertConfig(uniform(mixer).sites, seed=seed))
    parameters = sum(site.mixer_parameters for site in status(pipe).sites)
    costs = site_flops(pipe, (16, 16) if name == "mini" else (32, 32)).values()
    started = time.perf_counter()
    if parameters:
        start = "attention" if isinstance(mixer, DeltaConv) else "converted"
        config = replace(distillation(steps, seed), learning_rate=rate, start=start)
        distill(pipe, mini.training_data(), config)
    seconds = time.perf_counter() - started
    found = error(pipe, spread(mini.held_out_data(), 64))
    return {
        **key(name, rival, rate, seed, steps, weights),
        "epsilon_error": f"{found:.4e}",
        "parameters": parameters,
        "operations": sum(own for _, own in costs),
        "attention_operations": sum(attention for attention, _ in costs),
        "seconds": f"{seconds:.1f}",
    }


def key(name: str, rival: str, rate: float, seed: int, steps: int, weights: str) -> dict[str, str]:
    """What tells a row from the others."""
    return {
        "model": name,
        "mixer": rival,
        "learning_rate": f"{rate:g}",
        "seed": str(seed),
        "steps": str(steps),
        "weights": weights,
    }


def row(name: str, rival: str, rate: float, seed: int, steps: int) -> dict[str, str]:
    """The row of a run, which is done unless it is there."""
    weights = fingerprint(denoiser_of(MODELS[name]()))
    wanted = key(name, rival, rate, seed, steps, weights)
    there = [each for each in read() if wanted.items() <= each.items()]
    if not there:
        found = measured(name, rival, rate, seed, steps)
        append(found)
        print(*[found[column] for column in COLUMNS[:6]], flush=True)
        there = [{column: str(value) for column, value in found.items()}]
    return there[0]


def read() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def append(found: dict[str, Any]) -> None:
    new = not RESULTS.is_file()
    with open(RESULTS, "a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    first, *others = args.seeds
    for name in args.models:
        best = {}
        for rival in RIVALS:
            rates = RATES if rival != "nothing" else RATES[:1]
            rows = [row(name, rival, rate, first, args.steps) for rate in rates]
            best[rival] = min(rows, key=lambda each: float(each["epsilon_error"]))
        for rival, each in best.items():
            for seed in others if rival != "nothing" else ():
                row(name, rival, float(each["learning_rate"]), seed, args.steps)


if __name__ == "__main__":
    main()
