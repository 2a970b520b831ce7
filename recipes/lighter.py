"""Lighter blocks: quality against operations, the curve that a user chooses from.

`python recipes/lighter.py` distils students of the embedded model with blocks of fewer and fewer
channels, with kernels of 7 everywhere and with those that the analysis recommends
(`docs/analysis-mini/kernels.json`), and writes `results/lighter.csv`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from convfusion import ConvertConfig, DeltaConv, uniform
from experiment import Table, judged, recipe
from pages import ROOT

TABLE = Table("lighter.csv", ["kernels", "ratio", "seed", "steps", "made"], "choice")
RECOMMENDED = ROOT / "docs" / "analysis-mini" / "kernels.json"
RATIOS = (1.0, 0.5, 0.25, 0.125)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kernels = {
        "3": uniform(DeltaConv(kernel_size=3)),
        "7": uniform(DeltaConv()),
        "recommended": ConvertConfig.load(RECOMMENDED),
    }
    for name, blocks in kernels.items():
        for ratio in RATIOS:
            sites = {path: replace(mixer, ratio=ratio) for path, mixer in blocks.sites.items()}
            how = recipe(ConvertConfig(sites), args.steps, args.seed)
            key = (name, ratio, args.seed, args.steps, how.made("mini"))
            TABLE.once(lambda how=how: judged("mini", how), *key)


if __name__ == "__main__":
    main()
