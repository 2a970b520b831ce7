"""Quality against the share of the sites that are replaced, on the embedded model.

`python recipes/layers.py` measures what each site costs (stage 1 alone), and then distils students
of 1, 2, … and all sites: the cheapest first by either error, in diffusers' order, and every
second one. ε-errors on names that no training saw go to `results/layers.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from convfusion import ConvertConfig, DeltaConv, convert, mini, uniform
from convfusion.demo import spread
from convfusion.distill.partial import site_costs
from convfusion.families import denoiser_of, list_sites
from convfusion.surgery import select_every, select_sites
from experiment import JUDGED, Table, judged, recipe

TABLE = Table("layers.csv", ["order", "sites", "seed", "steps", "made"], "results")
ALL = uniform(DeltaConv())


def orders(steps: int, seed: int) -> dict[str, list[str]]:
    """The sites in the orders that they are replaced in."""
    pipe = mini.load_teacher()
    paths = [site.path for site in list_sites(denoiser_of(pipe))]
    convert(pipe, ConvertConfig(ALL.sites, seed=seed))
    held_out = spread(mini.held_out_data("choice"), JUDGED)
    training = recipe(ALL, steps, seed).settings  # one autocast for all runs of a process
    costs = site_costs(pipe, mini.training_data(), held_out, training)
    return {
        "least ε-error alone first": costs.cheapest("epsilon"),
        "least imitation error first": costs.cheapest("imitation"),
        "in diffusers' order": paths,
    }


def choices(steps: int, seed: int) -> Iterator[tuple[str, ConvertConfig]]:
    """What is converted; sets that two orders share are trained once."""
    found = orders(steps, seed)
    paths = found["in diffusers' order"]
    for name, order in found.items():
        for k in range(1, len(order) + 1):
            yield name, select_sites(ALL, sorted(order[:k], key=paths.index))
    for first in (0, 1):
        yield f"every second from {first + 1}", select_every(ALL, paths, 2, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for order, blocks in choices(args.steps, args.seed):
        how = recipe(blocks, args.steps, args.seed)
        key = (order, len(blocks.sites), args.seed, args.steps, how.made("mini"))
        TABLE.once(lambda how=how: judged("mini", how, "results"), *key)


if __name__ == "__main__":
    main()
