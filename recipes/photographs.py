"""A class-conditional model of Fashion-MNIST: does a student draw the same distribution?

`python recipes/photographs.py` distils two students of the small DiT that was trained on
Fashion-MNIST (`recipes/mini/fashion_teacher.py`), one with halo blocks and one with ΔConvBlocks,
and draws 10 000 pictures, a thousand of each class, with the teacher and with either, in 20 steps
and bfloat16. Kernel and Fréchet distance, precision, recall, density and coverage against the
10 000 test pictures, and against the teacher's pictures from other noises, go to
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
from convfusion.demo import measure_error, spread
from convfusion.evaluate import neighbourhoods
from convfusion.evaluate.real import decoded
from convfusion.fingerprint import fingerprint
from convfusion.generate import generate
from convfusion.mixers import Halo, Removed
from experiment import JUDGED, TEACHERS, Recipe, Table, recipe, student, weights_of
from mini.fashion import CLASSES, latents, pictures, read_pictures
from pages import ROOT
from pictures import Drawn, distances, extract_features, extractor

TABLE = Table("photographs.csv", ["pictures", "reference", "samples", "steps", "made"])
FASHION = TEACHERS["fashion"]
MOST = 10_000  # test pictures
SHOWN = ROOT / "docs" / "images" / "photographs.png"


@dataclass(frozen=True)
class Set:
    """Pictures that are judged.

    Attributes:
        name: of them.
        features: made when they are asked for.
        made: what tells them from others.
        drawn: by a model, and no pictures of Fashion-MNIST.
        how: the recipe of the student that drew them, if one did.
    """

    name: str
    features: Callable[[], Tensor]
    made: str = ""
    drawn: bool = False
    how: Recipe | None = None


def drawing(samples: int, first_seed: int = 0) -> Drawn:
    """Pictures of all classes without guidance."""
    return Drawn(samples, first_seed, steps=20, guidance=1.0, size=None)


def seen(maker: Callable[[], Any], made: str, drawn: Drawn) -> Tensor:
    """Features of pictures that a pipeline draws in bfloat16."""
    return extract_features(lambda: quick(maker()), made, drawn, CLASSES)


def quick(pipe: Any) -> Any:
    """The pipeline with the products of its transformer in bfloat16; latents stay in float32."""
    transformer = pipe.transformer
    transformer.forward = torch.autocast("cpu", torch.bfloat16)(transformer.forward)
    return pipe


def compared(features: Tensor, reference: Tensor, teacher: Tensor | None) -> dict[str, str]:
    """Distances and neighbourhoods as the columns of a row."""
    found = asdict(neighbourhoods(features, reference))
    return distances(features, reference, teacher) | {name: f"{v:.4f}" for name, v in found.items()}


def behind(count: int) -> Tensor:
    """Features of test pictures as the autoencoder gives them back."""
    found = decoded(FASHION.load(), latents("test", count), "test", (32, 32))
    return extractor()(found).features


def errors(how: Recipe | None) -> dict[str, str]:
    """The ε-error of a student on test pictures; none for what is no student."""
    if how is None:
        return {"epsilon_error": ""}
    held_out = spread(FASHION.held_out_data("results"), JUDGED)
    return {"epsilon_error": f"{measure_error(trained(how), held_out):.4e}"}


def trained(how: Recipe) -> Any:
    return student("fashion", how)[0]


def show(students: dict[str, Recipe]) -> None:
    """A row of pictures of each class by each model, at equal seeds."""
    pipes = {"the teacher": FASHION.load()}
    pipes |= {name: trained(how) for name, how in students.items()}
    rows = {"test pictures": first_of_each_class()}
    for name, pipe in pipes.items():
        rows[name] = generate(pipe, list(CLASSES), guidance=1.0, batch_size=len(CLASSES))
    report.draw_grid(rows, list(CLASSES)).save(SHOWN)


def first_of_each_class() -> list[Image]:
    images, labels = pictures("test", 512), read_pictures("test")[1]
    return [images[labels.index(k)] for k in range(len(CLASSES))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=10_000)
    args = parser.parse_args()
    own, other = drawing(args.samples), drawing(args.samples, first_seed=args.samples)
    own.plan(CLASSES)  # says now if they cannot be drawn
    count = args.samples
    if count > MOST:
        raise SystemExit(f"there are {MOST} test pictures: {count} samples are too many")
    students = {
        "halo blocks": recipe(uniform(Halo()), args.steps, learning_rate=2e-3),
        "ΔConvBlocks": recipe(uniform(DeltaConv()), args.steps),
    }
    teacher = f"{weights_of('fashion')}, bf16"
    nothing = Recipe(uniform(Removed()), None)
    show({**students, "nothing in place of self-attention": nothing})
    references = {
        "test": extractor()(pictures("test", count)).features,
        "teacher": seen(FASHION.load, teacher, other),
    }
    sets = [
        Set("training pictures", lambda: extractor()(pictures("train", count)).features),
        Set(
            "test pictures behind the autoencoder",
            partial(behind, count),
            fingerprint(FASHION.load().vae),
        ),
        Set("the teacher", partial(seen, FASHION.load, teacher, own), own.made(teacher), True),
    ]
    for name, how in students.items():
        made = f"{how.made('fashion')}, bf16"
        drawn_by = partial(seen, partial(trained, how), made, own)
        sets.append(Set(name, drawn_by, own.made(made), True, how))
    for each in sets:
        for reference, held in references.items():
            if each.drawn or reference == "test":
                steps = args.steps if each.how else 0
                TABLE.once(
                    lambda each=each, held=held: (
                        errors(each.how)
                        | compared(
                            each.features(),
                            held,
                            seen(FASHION.load, teacher, own) if each.how else None,
                        )
                    ),
                    *(each.name, reference, count, steps, each.made),
                )


if __name__ == "__main__":
    main()
