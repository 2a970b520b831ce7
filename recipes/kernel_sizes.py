"""Do kernels chosen from the analysis distil better than others, at an equal number of steps?

`python recipes/kernel_sizes.py` analyses the embedded model, distils each choice of kernels with
equal seeds and batches, and writes the ε-error on held-out names to `results/kernels.csv`.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from convfusion import ConvertConfig, DeltaConv, convert, mini, status, uniform
from convfusion.analysis import AnalysisConfig, analyze, recommend
from convfusion.demo import distillation, error, spread
from convfusion.distill import distill
from convfusion.operations import flops_ratio
from convfusion.surgery.config import with_kernel_sizes

RESULTS = Path(__file__).parent.parent / "results"
LATENTS = (16, 16)

# What the paper's SD1.5 kernels are on grids of 16×16 and 8×8 tokens; 4×4 is below its smallest.
PRESET_BY_GRID = {
    "down_blocks.0.*": 5,
    "up_blocks.2.*": 5,
    "down_blocks.1.*": 3,
    "up_blocks.1.*": 3,
    "mid_block.*": 3,
}


def choices() -> dict[str, ConvertConfig]:
    prompts = spread(mini.training_data(), 15, offset=0.5).captions
    analysis = analyze(mini.load_teacher(), prompts, AnalysisConfig(guidance=mini.GUIDANCE))
    return {
        "recommended": recommend(analysis),
        "recommended, by |Λ|": recommend(analysis, magnitude=True),
        "preset by grid": with_kernel_sizes(PRESET_BY_GRID),
        "3 everywhere": uniform(DeltaConv(kernel_size=3)),
        "13 everywhere": uniform(DeltaConv(kernel_size=13)),
    }


def run(kernels_of: ConvertConfig, seed: int, steps: int) -> tuple[str, int, float, float]:
    """Kernels by site, parameters of the blocks, FLOP ratio and ε-error after distillation."""
    pipe = mini.load_teacher()
    convert(pipe, ConvertConfig(sites=kernels_of.sites, seed=seed))
    sites = status(pipe).sites
    kernels = " ".join(f"{s.mixer.kernel_size}x{s.mixer.stages}" for s in sites)
    weights = sum(s.mixer_parameters for s in sites)
    config = replace(distillation(steps, seed), start="converted")
    distill(pipe, mini.training_data(), config)
    return kernels, weights, flops_ratio(pipe, LATENTS), error(pipe, held_out())


def held_out():
    return spread(mini.held_out_data(), 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    heads = "choice,seed,steps,epsilon_error,flops_ratio,parameters,kernels_x_stages,teacher_sha256"
    with open(RESULTS / "kernels.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(heads.split(","))
        for name, config in choices().items():
            for seed in args.seeds:
                kernels, weights, ratio, value = run(config, seed, args.steps)
                found = [f"{value:.4e}", f"{ratio:.3f}", weights, kernels]
                table.writerow([name, seed, args.steps, *found, mini.teacher_hash()[:12]])
                file.flush()
                print(name, seed, *found, flush=True)


if __name__ == "__main__":
    main()
