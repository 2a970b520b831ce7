"""Operations of video models at the sizes that people use: results/flops_video.csv.

What `convfusion bench flops` counts, at sizes of each model's own, and the whole denoisers too.
"""

from __future__ import annotations

import argparse

from convfusion.bench.counts import (
    RANKS,
    add_totals,
    list_contenders,
    operation_table,
    whole_costs,
    write_costs,
)
from convfusion.bench.models import bench_model
from pages import RESULTS

SIZES = {
    "wan-1.3b": ((480, 832), (720, 1280)),
    "wan-14b": ((480, 832), (720, 1280)),
    "ltx-2": ((1088, 1920),),
}  # (height, width) in pixels
FRAMES = {"wan-1.3b": 81, "wan-14b": 81, "ltx-2": 121}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    costs, whole = [], []
    for name, sizes in SIZES.items():
        model = bench_model(name)
        found = operation_table(model, sizes, list_contenders(model, ranks=RANKS))
        costs += found
        whole += whole_costs(model, add_totals(found))
    write_costs(costs, RESULTS / "flops_video.csv", whole)


if __name__ == "__main__":
    main()
