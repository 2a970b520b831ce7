"""How much do the two ways of pooling differ where a grid cannot be halved?

`python recipes/pooling.py` lets the shipped ΔConvBlocks pool in the other way than they were
trained with, on crops of held-out latents, and writes the change of the prediction to
`results/pooling.csv`.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

from convfusion import mini
from convfusion.demo import spread
from convfusion.evaluate import epsilon_error
from convfusion.surgery import attention_teacher, mixers_of
from pages import write

SIZES = ((16, 16), (16, 15), (15, 15), (13, 15), (13, 13))  # of the latents
SAMPLES = 32


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    pipe = mini.load_student("delta_conv")
    student, teacher = copy.deepcopy(pipe.unet), attention_teacher(pipe.unet)
    samples = spread(mini.held_out_data("results"), SAMPLES)
    rows = []
    for height, width in SIZES:
        latents = samples.latents[..., :height, :width]
        own = epsilon_error(pipe, teacher, latents, samples.captions)
        kinds = {path: mixer.config for path, mixer in mixers_of(pipe).items()}
        for mixer in mixers_of(pipe).values():
            mixer.config = replace(mixer.config, pooling="adaptive")
        change = epsilon_error(pipe, student, latents, samples.captions)
        other = epsilon_error(pipe, teacher, latents, samples.captions)
        for path, mixer in mixers_of(pipe).items():
            mixer.config = kinds[path]
        errors = {"change": change, "student_error": own, "changed_student_error": other}
        rows.append(
            {
                "height": height,
                "width": width,
                **{name: f"{error:.4e}" for name, error in errors.items()},
                "samples": SAMPLES,
                "teacher_sha256": mini.teacher_hash()[:12],
                "held_out": "results",
            }
        )
    write("pooling.csv", rows)


if __name__ == "__main__":
    main()
