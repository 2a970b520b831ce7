"""Quality against the share of the sites that are replaced, on the embedded model.

`python recipes/layers.py` measures what each site costs (stage 1 alone), and then distils students
of 1, 2, … and all sites, with halo blocks and with ΔConvBlocks: the cheapest first by either error,
in diffusers' order, and every second one. ε-errors on names that no training saw go to
`results/layers.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from convfusion import ConvertConfig, convert, mini
from convfusion.demo import spread
from convfusion.distill import DistillConfig
from convfusion.distill.partial import Ranking, SiteCosts, site_costs
from convfusion.families import denoiser_of, list_sites
from convfusion.surgery import select_every, select_sites
from experiment import JUDGED, Table, judged, recipe
from rivals import HALO, OURS, blocks_of, rate_of

KEYS = ("blocks", "order", "sites", "seed", "steps", "made")
TABLE = Table("layers.csv", KEYS, "results")
BY_COST: dict[str, Ranking] = {
    "least ε-error alone first": "epsilon",
    "least imitation error first": "imitation",
}
SECOND = "every second"
ORDERS = (*BY_COST, "in diffusers' order", SECOND)


def measure_sites(blocks: ConvertConfig, training: DistillConfig) -> SiteCosts:
    """What each site costs after stage 1, on the list `choice`."""
    pipe = mini.load_teacher()
    convert(pipe, blocks)
    held_out = spread(mini.held_out_data("choice"), JUDGED)
    return site_costs(pipe, mini.training_data(), held_out, training)


def choices(
    everywhere: ConvertConfig, training: DistillConfig, wanted: Sequence[str], counts: Sequence[int]
) -> Iterator[tuple[str, ConvertConfig]]:
    """What is converted, by the name of its order; sets that two orders share are trained once."""
    paths = [site.path for site in list_sites(denoiser_of(mini.load_teacher()))]
    orders = {"in diffusers' order": paths}
    if set(wanted) & set(BY_COST):
        costs = measure_sites(everywhere, training)
        orders |= {name: costs.cheapest(by) for name, by in BY_COST.items()}
    for name in wanted:
        if name == SECOND:
            for first in (0, 1):
                yield f"{name} from {first + 1}", select_every(everywhere, paths, 2, first)
            continue
        for k in counts:
            yield name, select_sites(everywhere, sorted(orders[name][:k], key=paths.index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, metavar="ORDER")
    parser.add_argument("--counts", nargs="+", type=int, default=range(1, 8), help="of sites")
    parser.add_argument("--blocks", nargs="+", choices=(OURS, HALO), default=(OURS, HALO))
    args = parser.parse_args()
    for name in args.blocks:
        rate = rate_of("mini", name)
        whole = recipe(blocks_of("mini", name), args.steps, args.seed, learning_rate=rate)
        for order, blocks in choices(whole.blocks, whole.settings, args.orders, args.counts):
            how = recipe(blocks, args.steps, args.seed, learning_rate=rate)
            key = (name, order, len(blocks.sites), args.seed, args.steps, how.made("mini"))
            TABLE.once(lambda how=how: judged("mini", how, "results"), *key)


if __name__ == "__main__":
    main()
