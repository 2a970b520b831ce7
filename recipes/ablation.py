"""What each part of the ΔConvBlock and of its training brings, on the embedded model.

`python recipes/ablation.py` changes one thing at a time about the demo's student, distils it with
equal steps, batches and noises, and writes the ε-error on names that no training saw. `parts` go to
`results/ablation.csv`; `kernels`, chosen from the analysis or otherwise, from the plain start, to
`results/kernels.csv`; each `init` of the blocks, after several numbers of steps, to
`results/initialisation.csv`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from torch import Tensor

from convfusion import ConvertConfig, DeltaConv, convert, mini, status, uniform
from convfusion.analysis import AnalysisConfig, analyze, recommend
from convfusion.demo import configure_distillation, measure_error, spread
from convfusion.distill import distill
from convfusion.mixers import MIXERS
from convfusion.mixers.delta_conv import DeltaConvBlock, Init
from convfusion.operations import operations_ratio
from convfusion.surgery.config import with_kernel_sizes
from experiment import JUDGED, TEACHERS, Recipe, Table, judged, recipe, student
from pages import add_all, has

PARTS = Table("ablation.csv", ["part", "variant", "seed", "steps", "made"], "choice")
KERNELS = Table("kernels.csv", ["choice", "seed", "steps", "made"], "choice")
INITS = "initialisation.csv"
# What the paper's SD1.5 kernels are on grids of 16×16 and 8×8 tokens; 4×4 is below its smallest.
PRESET_BY_GRID = {
    "down_blocks.0.*": 5,
    "up_blocks.2.*": 5,
    "down_blocks.1.*": 3,
    "up_blocks.1.*": 3,
    "mid_block.*": 3,
}


@dataclass(frozen=True)
class Ungated(DeltaConv):
    """A ΔConvBlock whose halves are added: nothing in it is multiplied by anything."""

    def build(self, channels: int, heads: int = 1) -> DeltaConvBlock:
        return UngatedBlock(channels, self)


class UngatedBlock(DeltaConvBlock):
    def list_stage_weights(self) -> list[Tensor]:
        return []  # never fused: the kernels gate

    def apply_gate(self, maps: Tensor) -> Tensor:
        first, second = maps.chunk(2, dim=1)
        return first + second


MIXERS["ungated"] = Ungated


def variants(steps: int, seed: int) -> dict[tuple[str, str], Recipe]:
    """Recipes by what they change and to what."""

    def block(**changed: Any) -> Recipe:
        return recipe(uniform(DeltaConv(**changed)), steps, seed)

    def trained(init: str = "mean", **changed: Any) -> Recipe:
        return recipe(uniform(DeltaConv(init=init)), steps, seed, **changed)

    def losses(**changed: float) -> Recipe:
        return trained(losses=replace(configure_distillation(steps).losses, **changed))

    def wide(feature: float = 1e-2, **changed: Any) -> Recipe:
        """Blocks of four times the channels and three stages, which save little."""
        losses = replace(configure_distillation(steps).losses, feature=feature)
        blocks = uniform(DeltaConv(kernel_size=5, stages=3, ratio=2.0, gate="sigmoid"))
        return recipe(blocks, steps, seed, losses=losses, **changed)

    ungated = recipe(uniform(Ungated()), steps, seed, start="converted")
    return {
        ("as it is", "K 7, 2 stages, scaled, ratio 1/2"): block(),
        **{("kernel", f"K {k}"): block(kernel_size=k) for k in (3, 5, 9, 13)},
        **{("stages", str(n)): block(stages=n) for n in (1, 3)},
        ("gate", "sigmoid"): block(gate="sigmoid"),
        ("gate", "reference"): block(gate="reference"),
        ("gate", "scaled, from the plain start"): trained(start="converted"),
        ("gate", "none, from the plain start"): ungated,
        ("mean branch", "none"): block(mean_branch=False),
        **{("channels", f"ratio {r:g}"): block(ratio=r) for r in (0.25, 1.0, 2.0)},
        ("loss", "no feature term"): losses(feature=0.0),
        ("loss", "with the true noise"): losses(noise=1.0),
        ("loss", "Min-SNR γ = 5"): losses(snr_gamma=5.0),
        ("loss", "feature term alone"): losses(distill=0.0),
        ("loss", "five times the feature term"): losses(feature=5e-2),
        ("loss", "25 times the feature term"): losses(feature=0.25),
        ("start", "random"): trained("random", start="converted"),
        ("start", "the mean branch alone"): trained(start="converted"),
        ("stage 1", "none"): trained(imitation_steps=0),
        ("stage 1", "half of the steps"): trained(imitation_steps=steps // 2),
        ("stage 1", "alone"): trained(imitation_steps=steps),
        ("wide", "K 5, 3 stages, sigmoid, ratio 2"): wide(),
        ("wide", "and five times the feature term"): wide(5e-2),
        ("wide", "and half the rate"): wide(5e-2, learning_rate=1e-2),
    }


def parts(steps: int, seed: int) -> None:
    for (part, name), how in variants(steps, seed).items():
        key = (part, name, seed, steps, how.made("mini"))
        PARTS.once(lambda how=how: judged("mini", how), *key)


@cache
def choices() -> dict[str, ConvertConfig]:
    """Kernel sizes by what chose them."""
    prompts = spread(mini.training_data(), 15, offset=0.5).captions
    analysis = analyze(mini.load_teacher(), prompts, AnalysisConfig(guidance=mini.GUIDANCE))
    return {
        "recommended": recommend(analysis),
        "recommended, by |Λ|": recommend(analysis, magnitude=True),
        "preset by grid": with_kernel_sizes(PRESET_BY_GRID),
        "3 everywhere": uniform(DeltaConv(kernel_size=3)),
        "13 everywhere": uniform(DeltaConv(kernel_size=13)),
    }


def kernels(steps: int, seed: int) -> None:
    def measured(how: Recipe) -> dict[str, Any]:
        pipe, _ = student("mini", how)
        sites = status(pipe).sites
        return {
            "epsilon_error": judged("mini", how)["epsilon_error"],
            "flops_ratio": f"{operations_ratio(pipe, TEACHERS['mini'].latents):.3f}",
            "parameters": sum(site.mixer_parameters for site in sites),
            "kernels_x_stages": " ".join(f"{s.mixer.kernel_size}x{s.mixer.stages}" for s in sites),
            "teacher_sha256": mini.teacher_hash()[:12],
        }

    for name, blocks in choices().items():
        how = recipe(blocks, steps, seed, start="converted")
        KERNELS.once(lambda how=how: measured(how), name, seed, steps, how.made("mini"))


def inits(steps: int, seed: int) -> None:
    """The ε-error before the distillation, and after a quarter, half and all of the steps."""
    for init in get_args(Init):
        how = recipe(uniform(DeltaConv(init=init)), steps, seed, start="converted")
        key = {"init": init, "seed": str(seed), "steps": str(steps), "made": how.made("mini")}
        key["held_out"] = "choice"
        if has(INITS, key):
            continue
        teacher = mini.teacher_hash()[:12]
        rows = [
            key | {"step": step, "epsilon_error": f"{value:.4e}", "teacher_sha256": teacher}
            for step, value in errors_along(how, {steps // 4, steps // 2, steps}).items()
        ]
        add_all(INITS, rows)
        for row in rows:
            print(*row.values(), flush=True)


def errors_along(how: Recipe, marks: set[int]) -> dict[int, float]:
    """The ε-error at the start of a distillation and after the marked steps."""
    pipe, held_out = mini.load_teacher(), spread(mini.held_out_data("choice"), JUDGED)
    convert(pipe, how.blocks)
    found = {0: measure_error(pipe, held_out)}

    def mark(step: int, terms: dict[str, float]) -> None:
        if step in marks:
            found[step] = measure_error(pipe, held_out)

    distill(pipe, mini.training_data(), how.settings, on_step=mark)
    return found


TABLES = {"parts": (parts, 100, [0]), "kernels": (kernels, 100, [0, 1, 2])}
TABLES["inits"] = (inits, 60, [0, 1, 2])  # what measures, its steps and seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--steps", type=int, help="in place of those of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of those of the tables")
    args = parser.parse_args()
    for name in args.tables:
        measure, steps, seeds = TABLES[name]
        for seed in args.seeds or seeds:
            measure(args.steps or steps, seed)


if __name__ == "__main__":
    main()
