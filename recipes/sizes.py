"""Pictures of other sizes than those of the training, by teacher and student.

`python recipes/sizes.py` fits held-out pictures into larger and oblong frames (on white, as they
are), and measures at each size, for the teacher and for a student of it,

- the noise error ‖ε̂ − ε‖²/‖ε‖² on those pictures, noised: who of the two is nearer to the truth;
- the ε-error of the student against the teacher;
- with `--samples`, up to 128 pixels, the kernel distance of drawn pictures to those, with its
  standard error.

It writes `results/sizes.csv`. The students are rivals of `rivals.py`, distilled for `--steps`, and
of the embedded model also the shipped ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from convfusion import mini
from convfusion.data import LatentDataset
from convfusion.data.pictures import encode_pictures
from convfusion.demo import spread
from convfusion.evaluate import TIMESTEPS, predictions, relative_error
from convfusion.evaluate.real import decoded
from convfusion.families import denoiser_of, encode_conditioning
from convfusion.schedule import noise_schedule
from experiment import SHIPPED, TEACHERS, TEXT_TO_IMAGE, Table, shipped, student, weights_of
from pictures import DISTANCES, Drawn, distances, extract_features, extractor
from reach import window_share
from rivals import HALO, OURS, WINDOW, rival

TABLE = Table("sizes.csv", ["model", "pipeline", "width", "height", "samples", "made"], "results")
SIZES = ((64, 64), (96, 96), (64, 128), (128, 64), (128, 128), (256, 256))  # (height, width)
STUDENTS = (OURS, HALO, WINDOW)
JUDGED = 32  # pictures that errors are measured on
DRAWN = 128  # the longest side that sets are drawn at: beyond it attention takes too long on a CPU
Size = tuple[int, int]


@cache
def framed(size: Size, count: int) -> LatentDataset:
    """Held-out pictures, enlarged into a frame of (height, width), as latents of both models."""
    pipe, data = mini.load_teacher(), spread(mini.held_out_data("results"), count)
    latents = []
    for image in decoded(pipe, data, "held out", (64, 64)):
        fitted = ImageOps.pad(image, size[::-1], Image.Resampling.BICUBIC, color="white")
        with torch.no_grad():
            latents.append(encode_pictures(pipe.vae, np.array(fitted)[None]))
    return LatentDataset(torch.cat(latents), data.captions)


def noises(data: LatentDataset) -> dict[int, Tensor]:
    """By timestep, the noise of each latent: those that `epsilon_error` draws."""
    generator = torch.Generator().manual_seed(123_456)
    return {t: torch.randn(data.latents.shape, generator=generator) for t in TIMESTEPS}


def predict(pipe: Any, size: Size) -> list[Tensor]:
    """The noise that a pipeline sees in the framed pictures, at each timestep."""
    data = framed(size, JUDGED)
    told = encode_conditioning(pipe, data.captions, size)
    schedule = noise_schedule(pipe.scheduler, denoiser_of(pipe))
    return predictions(denoiser_of(pipe), schedule, data.latents, noises(data), told)


@cache
def taught(model: str, size: Size) -> list[Tensor]:
    """As `predict`, by the teacher."""
    return predict(TEACHERS[model].load(), size)


def mean_error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Mean ‖a − b‖²/‖b‖² over latents and timesteps."""
    errors = [relative_error(*pair) for pair in zip(found, wanted, strict=True)]
    return torch.stack(errors).mean().item()


def latents_of(size: Size) -> Size:
    """(height, width) of the latents of pictures; both models have the same autoencoder."""
    return size[0] // 4, size[1] // 4


def measured(maker: Callable[[], Any], made: str, drawn: Drawn, model: str) -> dict[str, str]:
    """The row of a pipeline, the teacher's own or a student's, at one size."""
    size = drawn.size
    assert size is not None
    converted = made != weights_of(model)
    pipe = maker()
    found = predict(pipe, size) if converted else taught(model, size)
    kids = dict.fromkeys(DISTANCES, "")
    if drawn.samples and max(size) <= DRAWN:
        everyone = framed(size, len(mini.held_out_data("results")))
        reference = extractor()(decoded(pipe, everyone, "framed", size)).features
        whole = extract_features(TEACHERS[model].load, weights_of(model), drawn)
        kids = distances(extract_features(maker, made, drawn), reference, whole)
    return {
        "noise_error": f"{mean_error(found, noises(framed(size, JUDGED)).values()):.4e}",
        "epsilon_error": f"{mean_error(found, taught(model, size)):.4e}" if converted else "",
        "window_share": f"{window_share(pipe, latents_of(size)):.4f}" if converted else "",
        **kids,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=TEXT_TO_IMAGE, default=TEXT_TO_IMAGE)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=100, help="pictures of a set; 0: none")
    parser.add_argument("--longest", type=int, default=256, help="side in pixels")
    parser.add_argument("--shipped", action="store_true", help="the shipped students as well")
    args = parser.parse_args()
    for model in args.models:
        pipelines = {"teacher": (TEACHERS[model].load, weights_of(model))}
        for name in STUDENTS:
            how = rival(model, name, 0, args.steps)
            made = (lambda model=model, how=how: student(model, how)[0], how.made(model))
            pipelines[f"{name}, {args.steps} steps"] = made
        if args.shipped and model == "mini":
            pipelines |= {f"shipped, {name}": shipped(name) for name in SHIPPED}
        for height, width in (size for size in SIZES if max(size) <= args.longest):
            drawn = Drawn(args.samples, size=(height, width))
            for name, (maker, made) in pipelines.items():
                TABLE.once(
                    partial(measured, maker, made, drawn, model),
                    *(model, name, width, height, args.samples, drawn.made(made)),
                )


if __name__ == "__main__":
    main()
