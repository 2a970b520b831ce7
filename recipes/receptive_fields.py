"""Which part of the high-frequency map the effective receptive field should be taken of.

`python recipes/receptive_fields.py` measures Gaussian attention of known width on two grids, by
the positive part Λ⁺ and by the magnitude |Λ|, under several filters, and writes
`results/receptive_fields.csv`. A sound measure finds the window that holds 80 % of the Gaussian
itself, whatever the grid and the filter.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from convfusion.analysis import HighPass, Measure
from convfusion.analysis.statistics import attention_score_mass, receptive_field
from convfusion.analysis.streaming import measure_map, summarise
from pages import write

SIDES = (16, 32)
WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
FILTERS = tuple(HighPass(cutoff, order) for cutoff, order in product((0.5, 1, 2, 4), (1, 2, 4)))


def gaussian(side: int, width: float) -> torch.Tensor:
    """Attention that falls off as a Gaussian of standard deviation `width` tokens, [N, N]."""
    tokens = torch.arange(side, dtype=torch.float64)
    along = torch.exp(-((tokens[None] - tokens[:, None]) ** 2) / (2 * width**2))
    maps = torch.einsum("ik,jl->ijkl", along, along).flatten(2).flatten(0, 1)
    return (maps / maps.sum(-1, keepdim=True)).float()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for side, width, filters in product(SIDES, WIDTHS, FILTERS):
        sums = measure_map(gaussian(side, width), (side, side), Measure(filters, side**2))
        found = summarise(sums)[0]
        rows.append(
            {
                "side": side,
                "width": width,
                "cutoff": filters.cutoff,
                "order": filters.order,
                "of_itself": receptive_field(attention_score_mass(sums.rings[0, 0])),
                "positive": found.receptive_field,
                "magnitude": found.receptive_field_magnitude,
            }
        )
    write("receptive_fields.csv", rows)


if __name__ == "__main__":
    main()
