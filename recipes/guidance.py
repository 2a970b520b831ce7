"""Does a student need another guidance scale, other steps or another solver than its teacher?

`python recipes/guidance.py` draws with the embedded teacher and its student `near`, and writes
`results/guidance.csv`, the kernel distance of either to real pictures over guidance scales, and
`results/solvers.csv`, the PSNR of the student's pictures to the teacher's at equal seeds over
solvers and numbers of steps.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from convfusion import mini
from convfusion.evaluate import mean_psnr
from convfusion.generate import generate
from experiment import Table, shipped, weights_of
from pictures import BATCH, Drawn, distances, extract_features, real_pictures

SCALES = Table("guidance.csv", ["pipeline", "guidance", "samples", "made"], "results")
SOLVED = Table("solvers.csv", ["solver", "steps", "guidance", "samples", "made"], "results")
SOLVERS = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++ 2M": DPMSolverMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
}


def draw(pipe: Any, solver: str, steps: int, guidance: float, samples: int) -> list[Any]:
    """Pictures of held-out names."""
    pipe.scheduler = SOLVERS[solver].from_config(pipe.scheduler.config)
    captions = mini.held_out_data("results").captions
    prompts = captions[:: len(captions) // samples][:samples]
    return generate(pipe, prompts, steps=steps, guidance=guidance, batch_size=BATCH)


def alike(solver: str, steps: int, guidance: float, samples: int) -> dict[str, str]:
    """Mean PSNR of the student's pictures to the teacher's, with its standard error."""
    student, teacher = (
        draw(pipe, solver, steps, guidance, samples)
        for pipe in (mini.load_student(), mini.load_teacher())
    )
    found = mean_psnr(student, teacher)
    return {"psnr": f"{found.value:.2f}", "psnr_error": f"{found.error:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=245, help="pictures of a set")
    parser.add_argument("--pairs", type=int, default=32, help="pictures that are compared")
    args = parser.parse_args()
    maker, made = shipped()
    pipelines = {"teacher": (mini.load_teacher, weights_of("mini")), "student": (maker, made)}
    real = real_pictures(mini.load_teacher())
    for guidance in (1.0, 2.0, 3.0, 5.0, 7.5):
        for name, (make, weights) in pipelines.items():
            drawn = Drawn(args.samples, guidance=guidance)
            whole = partial(extract_features, mini.load_teacher, weights_of("mini"), drawn)
            SCALES.once(
                lambda make=make, weights=weights, drawn=drawn, whole=whole: distances(
                    extract_features(make, weights, drawn), real, whole()
                ),
                *(name, guidance, args.samples, drawn.made(weights)),
            )
    for solver in SOLVERS:
        for steps in (10, 25, 50):
            SOLVED.once(
                lambda solver=solver, steps=steps: alike(solver, steps, mini.GUIDANCE, args.pairs),
                *(solver, steps, mini.GUIDANCE, args.pairs, made),
            )


if __name__ == "__main__":
    main()
