"""A class-conditional model on real photographs: does a student draw the same distribution?

`python recipes/photographs.py` distils a student of the small DiT that was trained on Fashion-MNIST
(`recipes/mini/fashion_teacher.py`) and draws 10 000 pictures, a thousand of each class, with the
teacher and with the student. Kernel and Fréchet distance, precision, recall, density and coverage
against the 10 000 test pictures, and against the teacher's pictures from other noises, go to
`results/photographs.csv`, beside those of the first 10 000 training pictures and of the test
pictures behind the autoencoder; `docs/images/photographs.png` shows some.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from convfusion import DeltaConv, report, uniform
from convfusion.demo import error, spread
from convfusion.evaluate import neighbourhoods
from convfusion.evaluate.real import decoded
from convfusion.generate import generate
from convfusion.mixers import Removed
from experiment import JUDGED, TEACHERS, Recipe, Table, recipe, student, weights_of
from mini.fashion import CLASSES, latents, pictures
from pages import ROOT
from pictures import Drawn, distances, extractor, look

TABLE = Table("photographs.csv", ["pictures", "reference", "samples", "steps", "made"])
FASHION = TEACHERS["fashion"]
SHOWN = ROOT / "docs" / "images" / "photographs.png"


@dataclass(frozen=True)
class Set:
    """Pictures that are judged.

    Attributes:
        name: of them.
        features: made when they are asked for.
        made: what tells them from others.
        drawn: by a model, and not photographs.
        how: the recipe of the student that drew them, if one did.
    """

    name: str
    features: Callable[[], Tensor]
    made: str = ""
    drawn: bool = False
    how: Recipe | None = None


def seen(maker: Callable[[], Any], made: str, samples: int, first_seed: int = 0) -> Tensor:
    """Features of pictures that a pipeline draws, without guidance."""
    drawn = Drawn(samples, first_seed, steps=20, guidance=1.0, size=None)
    return look(lambda: quick(maker()), f"{made}, bf16", drawn, CLASSES)


def quick(pipe: Any) -> Any:
    """The pipeline with the products of its transformer in bfloat16; latents stay in float32."""
    transformer = pipe.transformer
    transformer.forward = torch.autocast("cpu", torch.bfloat16)(transformer.forward)
    return pipe


def compared(features: Tensor, reference: Tensor) -> dict[str, str]:
    """Distances and neighbourhoods as the columns of a row."""
    found = asdict(neighbourhoods(features, reference))
    return distances(features, reference) | {name: f"{v:.4f}" for name, v in found.items()}


def behind(count: int) -> Tensor:
    """Features of test pictures as the autoencoder gives them back."""
    found = decoded(FASHION.load(), latents("test", count), "test", (32, 32))
    return extractor()(found).features


def errors(how: Recipe | None) -> dict[str, str]:
    """The ε-error of a student on test pictures; none for what is no student."""
    if how is None:
        return {"epsilon_error": ""}
    held_out = spread(FASHION.held_out_data(), JUDGED)
    return {"epsilon_error": f"{error(trained(how), held_out):.4e}"}


def trained(how: Recipe) -> Any:
    return student("fashion", how)[0]


def show(students: dict[str, Recipe]) -> None:
    """A row of pictures of each class by each model, at equal seeds."""
    pipes = {"the teacher": FASHION.load()}
    pipes |= {name: trained(how) for name, how in students.items()}
    rows = {"test pictures": first_of_each_class()}
    for name, pipe in pipes.items():
        rows[name] = generate(pipe, list(CLASSES), guidance=1.0, batch_size=len(CLASSES))
    report.labelled_grid(rows, list(CLASSES)).save(SHOWN)


def first_of_each_class() -> list[Image]:
    data, images = latents("test", 512), pictures("test", 512)
    return [images[data.captions.index(name)] for name in CLASSES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=10_000)
    args = parser.parse_args()
    count, teacher = args.samples, weights_of("fashion")
    how = recipe(uniform(DeltaConv()), args.steps)
    made = how.made("fashion")
    nothing = Recipe(uniform(Removed()), None)
    show({"the student": how, "nothing in place of self-attention": nothing})
    references = {
        "test": extractor()(pictures("test", count)).features,
        "teacher": seen(FASHION.load, teacher, count, first_seed=count),
    }
    sets = [
        Set("training pictures", lambda: extractor()(pictures("train", count)).features),
        Set("test pictures behind the autoencoder", partial(behind, count), teacher),
        Set("the teacher", partial(seen, FASHION.load, teacher, count), teacher, drawn=True),
        Set("the student", partial(seen, partial(trained, how), made, count), made, True, how),
    ]
    for each in sets:
        for reference, held in references.items():
            if each.drawn or reference == "test":
                steps = each.how.settings.steps if each.how and each.how.settings else 0
                TABLE.once(
                    lambda each=each, held=held: errors(each.how) | compared(each.features(), held),
                    *(each.name, reference, count, steps, each.made),
                )


if __name__ == "__main__":
    main()
