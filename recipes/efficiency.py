"""How many steps each recipe needs to reach the quality of the paper's.

`python recipes/efficiency.py` distils each mini model by the paper's recipe as written (random
start, its warm-up in proportion) for a number of steps fixed beforehand. Its final ε-error, and 1.2
and 2 times that, are the thresholds; then the same recipe runs with a better start, with stage 1
before it, and with both, and so does the recipe of this project, until they reach them. Equal
batches and seeds. Each run is a row of `results/efficiency.csv` as soon as it is done, and runs
that are there already are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convfusion import ConvertConfig, DeltaConv, convert, mini, uniform
from convfusion.data import LatentDataset
from convfusion.demo import configure_distillation, spread
from convfusion.distill import DistillConfig, distill
from convfusion.evaluate import epsilon_error
from convfusion.families import Denoiser, denoiser_of
from convfusion.surgery import attention_teacher
from experiment import TEACHERS, TEXT_TO_IMAGE, unfused, weights_of
from pages import add_all, rows

RESULTS = "efficiency.csv"
PAPER_WARMUP = 500 / 60_000  # of SD1.5's steps
STEPS = {"mini": 1000, "pixart": 400}  # of the paper's recipe; a step of the PixArt takes longer


@dataclass(frozen=True)
class Recipe:
    """A way to train: how the blocks start, and the settings for a run of so many steps."""

    blocks: ConvertConfig
    settings: Callable[[int, int], DistillConfig]  # of steps and seed


def paper(steps: int, seed: int) -> DistillConfig:
    """The paper's recipe as written, but for its length and batch."""
    return DistillConfig.paper(steps=steps, warmup=round(PAPER_WARMUP * steps), seed=seed)


RANDOM, MEAN = uniform(DeltaConv(init="random")), uniform(DeltaConv())
RECIPES = {
    "paper": Recipe(RANDOM, paper),
    "+ initialisation": Recipe(MEAN, lambda s, seed: replace(paper(s, seed), start="attention")),
    "+ stage 1": Recipe(RANDOM, lambda s, seed: replace(paper(s, seed), imitation_steps=s // 20)),
    "+ both": Recipe(
        MEAN,
        lambda s, seed: replace(paper(s, seed), start="attention", imitation_steps=s // 20),
    ),
}
SHARES = (0.02, 0.05, 0.1, 0.2)  # of the paper's steps, that this project's recipe is run for


class ReachedError(Exception):
    """The last threshold is reached: there is nothing more to learn from this run."""


class AskedOnce:
    """A teacher that keeps its answers: asked the same in the same order, it gives them again."""

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher, self.device, self.dtype = teacher, teacher.device, teacher.dtype
        self.answers: list[Any] = []
        self.again: Iterator[Any] = iter(())

    def __call__(self, noisy: Tensor, **others: Any) -> Any:
        kept = next(self.again, None)
        if kept is None:
            kept = noisy.clone(), self.teacher(noisy, **others)
            self.answers.append(kept)
        asked, answer = kept
        assert torch.equal(asked, noisy), "asked something else than the first time"
        return answer

    def error(self, pipe: Any, held_out: LatentDataset) -> float:
        """The ε-error of a pipeline against this teacher; always of the same samples."""
        self.again = iter(self.answers)
        return epsilon_error(pipe, self, held_out.latents, held_out.captions)


def curve(
    pipe: Any, recipe: Recipe, steps: int, seed: int, marks: list[int], enough: float
) -> list[tuple[int, float, float]]:
    """Step, processor seconds of training and ε-error at each mark, until it is low enough."""
    config = replace(recipe.settings(steps, seed), autocast="bf16")
    unfused(pipe)
    convert(pipe, ConvertConfig(sites=recipe.blocks.sites, seed=seed))
    held_out = spread(mini.held_out_data("results"), 32)
    teacher = AskedOnce(attention_teacher(denoiser_of(pipe)))
    found: list[tuple[int, float, float]] = []
    measuring, started = 0.0, time.process_time()

    def mark(step: int, terms: dict[str, float]) -> None:
        nonlocal measuring
        if step not in marks:
            return
        before = time.process_time()
        found.append((step, before - started - measuring, teacher.error(pipe, held_out)))
        measuring += time.process_time() - before
        if found[-1][2] <= enough:
            raise ReachedError

    with contextlib.suppress(ReachedError):
        distill(pipe, mini.training_data(), config, on_step=mark)
    return found


def run(name: str, recipe: str, seed: int, steps: int, length: int, enough: float) -> float:
    """One run, unless it is there already; returns its last ε-error."""
    key = {"model": name, "recipe": recipe, "seed": str(seed), "length": str(length)}
    key["held_out"] = "results"
    weights = {"weights": weights_of(name)}
    there = [row for row in rows(RESULTS) if (key | weights).items() <= row.items()]
    if not there:
        pipe = TEACHERS[name].load()
        every = max(1, steps // 50)
        marks = [*range(every, length, every), length] if length == steps else [length]
        chosen = RECIPES.get(recipe, Recipe(MEAN, configure_distillation))
        found = curve(pipe, chosen, length, seed, marks, enough)
        there = [
            {**key, "step": str(s), "seconds": f"{t:.1f}", "epsilon_error": f"{e:.4e}"} | weights
            for s, t, e in found
        ]
        add_all(RESULTS, there)
        print(*there[-1].values(), flush=True)
    return float(there[-1]["epsilon_error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=TEXT_TO_IMAGE, default=TEXT_TO_IMAGE)
    parser.add_argument("--steps", type=int, help="of the paper's recipe, in place of its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for name in args.models:
        steps = args.steps or STEPS[name]
        for seed in args.seeds:
            final = run(name, "paper", seed, steps, steps, 0.0)
            for recipe in list(RECIPES)[1:]:
                run(name, recipe, seed, steps, steps, final)
            for share in SHARES:
                run(name, "this project's", seed, steps, round(share * steps), 0.0)


if __name__ == "__main__":
    main()
