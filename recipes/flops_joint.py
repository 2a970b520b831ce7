"""Operations of models whose text and image share their attention: results/flops_joint.csv.

What `convfusion bench flops` counts at 1024, 2048 and 4096 pixels a side, where a model can draw
them: from image to image, what involves the text, and the whole denoiser.
"""

from __future__ import annotations

import argparse

from convfusion.bench.counts import list_contenders
from convfusion.bench.joint_counts import SIZES, count_joint, write_joint
from convfusion.bench.models import bench_model
from pages import RESULTS

MODELS = (
    "prx-1.2b",
    "sd3-medium",
    "sd35-medium",
    "sd35-large",
    "flux1-dev",
    "chroma1-hd",
    "qwen-image",
    "z-image",
    "lumina-image-2",
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for name in MODELS:
        model = bench_model(name)
        sizes = [size for size in SIZES if model.draws(size)]
        rows += count_joint(model, sizes, list_contenders(model))
    write_joint(rows, RESULTS / "flops_joint.csv")


if __name__ == "__main__":
    main()
