"""Step 6: the shipped student, distilled from the packaged teacher on all training pictures.

`python student.py --run run` converts the teacher, trains the blocks with
`convfusion.distill` (checkpoints under `run/student`, resumed by running it again) and writes them
to `src/convfusion/mini/student`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import caption, load_pictures
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import track
from teacher import encode

import convfusion
from convfusion import DeltaConv, mini, uniform
from convfusion.data import LatentDataset
from convfusion.demo import configure_distillation
from convfusion.distill import DistillConfig, distill

# Wider than the live demo's blocks: there is time to train them.
SHIPPED = uniform(DeltaConv(kernel_size=5, stages=3, ratio=2.0, gate="sigmoid"))


def settings(steps: int) -> DistillConfig:
    """The demo's recipe with more weight on the features."""
    base = configure_distillation(steps)
    return replace(
        base,
        losses=replace(base.losses, feature=5e-2),
        autocast="bf16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, default=6000)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = mini.load_teacher().to(device)
    pipe.unet.set_attn_processor(AttnProcessor())  # on CPU faster to train than the fused one
    pictures = load_pictures(args.run, "train")
    latents = encode(pipe.vae, pictures.images, device).cpu()
    data = LatentDataset(latents, [caption(row) for row in pictures.rows])
    convfusion.convert(pipe, SHIPPED)
    progress = iter(track(range(args.steps), "distilling"))
    result = distill(
        pipe,
        data,
        settings(args.steps),
        args.run / "student",
        resume=True,
        on_step=lambda step, terms: next(progress, None),
    )
    if not result.stopped:
        pipe.unet.half()  # as the packaged teacher is
        convfusion.save(pipe, mini.STUDENT)


if __name__ == "__main__":
    main()
