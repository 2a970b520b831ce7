"""Which initialisation of the blocks distils fastest, on the embedded model.

`python recipes/initialisation.py` distils each one with equal seeds and batches and writes the
ε-error on held-out names to `results/initialisation.csv`, at several steps and for each seed.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from typing import get_args

from convfusion import DeltaConv, convert, mini, uniform
from convfusion.demo import distillation, error, spread
from convfusion.distill import distill
from convfusion.mixers.delta_conv import Init

RESULTS = Path(__file__).parent.parent / "results"


def run(init: str, seed: int, steps: int, marks: list[int]) -> dict[int, float]:
    """The ε-error before distillation and after each marked step."""
    pipe = mini.load_teacher()
    convert(pipe, uniform(DeltaConv(init=init), seed=seed))
    held_out = spread(mini.held_out_data(), 32)
    errors = {0: error(pipe, held_out)}

    def mark(step: int, terms: dict[str, float]) -> None:
        if step in marks:
            errors[step] = error(pipe, held_out)
            print(init, seed, step, f"{errors[step]:.3e}", flush=True)

    config = replace(distillation(steps, seed), start="converted")
    distill(pipe, mini.training_data(), config, on_step=mark)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    marks = [args.steps // 4, args.steps // 2, args.steps]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "initialisation.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["init", "seed", "steps", "step", "epsilon_error", "teacher_sha256"])
        for init in get_args(Init):
            for seed in args.seeds:
                for step, value in run(init, seed, args.steps, marks).items():
                    row = [init, seed, args.steps, step, f"{value:.4e}", mini.teacher_hash()[:12]]
                    table.writerow(row)
                    file.flush()


if __name__ == "__main__":
    main()
