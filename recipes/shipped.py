"""How near the shipped students are to their teacher: errors, pictures, and pictures as sets.

`python recipes/shipped.py` takes each student that comes with the embedded model and measures

- the ε-error on the whole list `results`, and what no self-attention leaves there;
- the mean PSNR of its pictures to the teacher's of equal prompts and noises, with its error;
- the kernel distance of as many pictures as `--samples` to the teacher's from other noises, beyond
  the distance that the teacher itself has to them (the floor), with its error. 490 pictures, two of
  each caption, leave an error of 0.4 thousandths or less; and the same to real pictures.

One row a student, and one of the teacher, in `results/shipped.csv`.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from typing import Any

from convfusion import convert, mini, status, uniform
from convfusion.demo import measure_error, spread
from convfusion.evaluate import mean_psnr
from convfusion.generate import generate
from convfusion.mixers import Removed
from convfusion.operations import site_operations
from experiment import SHIPPED, TEACHERS, Table, shipped, weights_of
from pictures import BATCH, Drawn, distances, extract_features, real_pictures
from reach import window_share

TABLE = Table("shipped.csv", ["student", "samples", "pairs", "made"], "results")
LATENTS = TEACHERS["mini"].latents
TEACHER = "the teacher"


@cache
def removed_error() -> float:
    """The ε-error without self-attention."""
    pipe = mini.load_teacher()
    convert(pipe, uniform(Removed()))
    return measure_error(pipe, mini.held_out_data("results"))


@cache
def pictures_of(name: str, pairs: int) -> list[Any]:
    """Pictures of evenly spread captions of the list, each from a seed of its own."""
    pipe = mini.load_teacher() if name == TEACHER else mini.load_student(name)
    prompts = spread(mini.held_out_data("results"), pairs).captions
    return generate(pipe, prompts, guidance=mini.GUIDANCE, batch_size=BATCH)


def compare(name: str, samples: int, pairs: int) -> dict[str, Any]:
    """The columns of the row of a student, or of the teacher."""
    own, other = Drawn(samples), Drawn(samples, first_seed=samples)
    stock, made = mini.load_teacher, weights_of("mini")
    maker, made_by = (stock, made) if name == TEACHER else shipped(name)
    drawn, whole = extract_features(maker, made_by, own), extract_features(stock, made, own)
    sets = {
        "teacher": distances(drawn, extract_features(stock, made, other), whole, paired=True),
        "real": distances(drawn, real_pictures(stock()), whole),
    }
    kids = {
        f"{reference}_{column}": value
        for reference, row in sets.items()
        for column, value in row.items()
        if column.startswith("kid")
    }
    return describe(name, pairs) | kids


def describe(name: str, pairs: int) -> dict[str, Any]:
    """Error, pictures and costs of a student; nothing of the teacher."""
    columns = ("epsilon_error", "removed_error", "psnr", "psnr_error", "parameters")
    columns += ("operations", "attention_operations", "window_share")
    if name == TEACHER:
        return dict.fromkeys(columns, "")
    pipe = mini.load_student(name)
    costs = site_operations(pipe, LATENTS).values()
    psnr = mean_psnr(pictures_of(name, pairs), pictures_of(TEACHER, pairs))
    values = (
        f"{measure_error(pipe, mini.held_out_data('results')):.4e}",
        f"{removed_error():.4e}",
        f"{psnr.value:.2f}",
        f"{psnr.error:.2f}",
        sum(site.mixer_parameters for site in status(pipe).sites),
        sum(own for _, own in costs),
        sum(attention for attention, _ in costs),
        f"{window_share(pipe, LATENTS):.4f}",
    )
    return dict(zip(columns, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=490, help="pictures of a set")
    parser.add_argument("--pairs", type=int, default=64, help="pictures that are compared")
    args = parser.parse_args()
    Drawn(args.samples).plan()  # says now if they cannot be drawn
    for name in (TEACHER, *SHIPPED):
        made = weights_of("mini") if name == TEACHER else shipped(name)[1]
        measure = partial(compare, name, args.samples, args.pairs)
        TABLE.once(measure, name, args.samples, args.pairs, made)


if __name__ == "__main__":
    main()
