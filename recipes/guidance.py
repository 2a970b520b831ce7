"""Does a student need another guidance scale, other steps or another solver than its teacher?

`python recipes/guidance.py` draws with the embedded teacher, with two rivals of `rivals.py` that
were distilled for 100 steps, a halo block and the ΔConvBlock, and with `--shipped` also with the
shipped students. `results/solvers.csv` has the PSNR of their pictures to the teacher's at equal
seeds, over guidance scales, solvers and numbers of steps, `results/guidance.csv` the kernel
distance of either to real pictures over guidance scales.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from convfusion import mini
from convfusion.demo import spread
from convfusion.evaluate import mean_psnr
from convfusion.generate import generate
from experiment import SHIPPED, Table, shipped, student, weights_of
from pictures import BATCH, Drawn, distances, extract_features, real_pictures
from rivals import HALO, OURS, rival

SCALES = Table("guidance.csv", ["pipeline", "guidance", "samples", "made"], "results")
KEYS = ("pipeline", "solver", "steps", "guidance", "samples", "made")
SOLVED = Table("solvers.csv", KEYS, "results")
SOLVERS = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++ 2M": DPMSolverMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
}
GUIDANCE = (1.0, 2.0, mini.GUIDANCE, 5.0, 7.5)
STEPS = 25
WAYS = [("DDIM", STEPS, guidance) for guidance in GUIDANCE]  # solver, steps, guidance
WAYS += [(solver, STEPS, mini.GUIDANCE) for solver in ("DPM-Solver++ 2M", "Euler")]
WAYS += [(solver, steps, mini.GUIDANCE) for steps in (10, 50) for solver in SOLVERS]
Made = tuple[Callable[[], Any], str]  # what makes a pipeline, and what tells it from others


def draw(pipe: Any, solver: str, steps: int, guidance: float, samples: int) -> list[Any]:
    """Pictures of held-out names."""
    pipe.scheduler = SOLVERS[solver].from_config(pipe.scheduler.config)
    prompts = spread(mini.held_out_data("results"), samples).captions
    return generate(pipe, prompts, steps=steps, guidance=guidance, batch_size=BATCH)


@cache
def draw_teacher(*way: Any) -> list[Any]:
    """As `draw`, by the teacher."""
    return draw(mini.load_teacher(), *way)


def alike(maker: Callable[[], Any], *way: Any) -> dict[str, str]:
    """Mean PSNR of the student's pictures to the teacher's, with its standard error."""
    found = mean_psnr(draw(maker(), *way), draw_teacher(*way))
    return {"psnr": f"{found.value:.2f}", "psnr_error": f"{found.error:.2f}"}


def students(with_shipped: bool) -> dict[str, Made]:
    """Pipelines by what a table calls them."""
    found: dict[str, Made] = {}
    for name in (HALO, OURS):
        how = rival("mini", name, 0, 100)
        found[f"{name}, 100 steps"] = (lambda how=how: student("mini", how)[0], how.made("mini"))
    if with_shipped:
        found |= {f"shipped, {name}": shipped(name) for name in SHIPPED}
    return found


def measure_sets(pipelines: dict[str, Made], samples: int) -> None:
    """Rows of the kernel distance to real pictures."""
    real = real_pictures(mini.load_teacher())
    for guidance in GUIDANCE:
        drawn = Drawn(samples, guidance=guidance)
        whole = partial(extract_features, mini.load_teacher, weights_of("mini"), drawn)
        for name, (make, weights) in pipelines.items():
            SCALES.once(
                lambda make=make, weights=weights, drawn=drawn, whole=whole: distances(
                    extract_features(make, weights, drawn), real, whole()
                ),
                *(name, guidance, samples, drawn.made(weights)),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=245, help="pictures of a set; 0: none")
    parser.add_argument("--pairs", type=int, default=32, help="pictures that are compared")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="of drawing, the first ones")
    parser.add_argument("--shipped", action="store_true", help="the shipped students as well")
    args = parser.parse_args()
    found = students(args.shipped)
    for solver, steps, guidance in WAYS[: args.ways]:
        for name, (make, made) in found.items():
            way = (solver, steps, guidance, args.pairs)
            SOLVED.once(partial(alike, make, *way), name, *way, made)
    if args.samples:
        measure_sets({"teacher": (mini.load_teacher, weights_of("mini")), **found}, args.samples)


if __name__ == "__main__":
    main()
