"""What each part of the ΔConvBlock and of its training brings, on the embedded model.

`python recipes/ablation.py` changes one thing at a time about the demo's student, distils it with
equal steps, batches and noises, and writes the ε-error on names that no training saw to
`results/ablation.csv`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from convfusion import DeltaConv, uniform
from convfusion.demo import distillation
from convfusion.mixers import MIXERS
from convfusion.mixers.delta_conv import DeltaConvBlock
from experiment import Recipe, Table, judged, recipe

TABLE = Table("ablation.csv", ["part", "variant", "seed", "steps", "made"])


@dataclass(frozen=True)
class Ungated(DeltaConv):
    """A ΔConvBlock whose halves are added: nothing in it is multiplied by anything."""

    def build(self, channels: int, heads: int = 1) -> DeltaConvBlock:
        return UngatedBlock(channels, self)


class UngatedBlock(DeltaConvBlock):
    def stage_weights(self) -> list[Tensor]:
        return []  # never fused: the kernels gate

    def meet(self, maps: Tensor) -> Tensor:
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
        return trained(losses=replace(distillation(steps).losses, **changed))

    def wide(feature: float = 1e-2, **changed: Any) -> Recipe:
        """Wide blocks, step by step towards the settings of `mini/student.py`."""
        losses = replace(distillation(steps).losses, feature=feature)
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
        ("optimiser", "Muon"): trained(optimizer="muon"),
        ("optimiser", "Muon at half the rate"): trained(optimizer="muon", learning_rate=1e-2),
        ("start", "random"): trained("random", start="converted"),
        ("start", "the mean branch alone"): trained(start="converted"),
        ("stage 1", "none"): trained(imitation_steps=0),
        ("stage 1", "half of the steps"): trained(imitation_steps=steps // 2),
        ("stage 1", "alone"): trained(imitation_steps=steps),
        ("wide", "K 5, 3 stages, sigmoid, ratio 2"): wide(),
        ("wide", "and five times the feature term"): wide(5e-2),
        ("wide", "and half the rate"): wide(5e-2, learning_rate=1e-2),
        ("wide", "and Muon"): wide(5e-2, learning_rate=1e-2, optimizer="muon"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for seed in args.seeds:
        for (part, name), how in variants(args.steps, seed).items():
            key = (part, name, seed, args.steps, how.made("mini"))
            TABLE.once(lambda how=how: judged("mini", how), *key)


if __name__ == "__main__":
    main()
