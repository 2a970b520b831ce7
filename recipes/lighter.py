"""Lighter blocks: quality against operations, the curve that a user chooses from.

`python recipes/lighter.py` distils students of the embedded model with halo blocks of several
ranks, windows and cells, and with ΔConvBlocks of fewer and fewer channels, whose kernels are 3, 7,
or those that the analysis recommends (`docs/analysis-mini/kernels.json`). It writes
`results/lighter.csv`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from convfusion import ConvertConfig, DeltaConv, uniform
from convfusion.mixers import Halo
from experiment import Table, judged, recipe
from pages import ROOT

TABLE = Table("lighter.csv", ["blocks", "seed", "steps", "made"], "results")
RECOMMENDED = ROOT / "docs" / "analysis-mini" / "kernels.json"
RATIOS = (1.0, 0.5, 0.25, 0.125)
HALOS = {
    "halo, r 1/2, n 3/4": Halo(key_ratio=0.5, value_ratio=0.75),
    "halo, r 1/2, n 1/2": Halo(key_ratio=0.5),
    "halo, r 1/4, n 1/2, 64 cells": Halo(cells=8),
    "halo, r 1/4, n 1/2": Halo(),
    "halo, r 1/4, n 1/2, window 6": Halo(window=6),
    "halo, r 1/8, n 3/8, window 6": Halo(window=6, key_ratio=0.125, value_ratio=0.375),
    "halo, r 1/8, n 1/4, window 4": Halo(window=4, key_ratio=0.125, value_ratio=0.25),
}


def variants() -> dict[str, tuple[ConvertConfig, float]]:
    """Blocks and their learning rates, by what a table calls them."""
    kernels = {
        "K 7": uniform(DeltaConv()),
        "K 3": uniform(DeltaConv(kernel_size=3)),
        "recommended kernels": ConvertConfig.load(RECOMMENDED),
    }
    found = {
        name: (uniform(halo), 5e-3 if halo.key_ratio >= 0.25 else 1e-2)
        for name, halo in HALOS.items()
    }
    for name, blocks in kernels.items():
        for ratio in RATIOS:
            sites = {path: replace(mixer, ratio=ratio) for path, mixer in blocks.sites.items()}
            found[f"ΔConvBlock, {name}, ratio {ratio:g}"] = (ConvertConfig(sites), 2e-2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=variants())
    args = parser.parse_args()
    for name, (blocks, rate) in variants().items():
        if args.only and name not in args.only:
            continue
        how = recipe(blocks, args.steps, args.seed, learning_rate=rate)
        key = (name, args.seed, args.steps, how.made("mini"))
        TABLE.once(lambda how=how: judged("mini", how, "results"), *key)


if __name__ == "__main__":
    main()
