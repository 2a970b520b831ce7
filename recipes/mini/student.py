"""Step 6: the shipped students, distilled from the packaged teacher on all training pictures.

`python student.py delta_conv` trains the paper's blocks, `python student.py near` the halo blocks
of `configs/mini-halo.json`, which a budget of 3.05x chose by the moments of 48 training pictures.
Either takes at most 40 minutes of one core, keeps checkpoints under `run/`, is resumed by running
it again, and is written to `src/convfusion/mini/students`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from common import caption, load_pictures
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import track
from teacher import encode

import convfusion
from convfusion import ConvertConfig, mini
from convfusion.data import LatentDataset
from convfusion.demo import configure_distillation
from convfusion.distill import DistillConfig, distill
from convfusion.surgery.presets import get_preset

NEAR = Path(__file__).parents[2] / "configs" / "mini-halo.json"


@dataclass(frozen=True)
class Run:
    """How one of the students is made.

    Attributes:
        blocks: what stands at each site.
        steps: of the distillation, which one core does in 40 minutes.
        learning_rate: that the blocks train well with.
        feature: weight of the features in the loss.
    """

    blocks: ConvertConfig
    steps: int
    learning_rate: float
    feature: float

    def settings(self, steps: int) -> DistillConfig:
        """The demo's recipe in bfloat16."""
        base = configure_distillation(steps, learning_rate=self.learning_rate)
        return replace(base, losses=replace(base.losses, feature=self.feature), autocast="bf16")


def plan_run(name: mini.Student) -> Run:
    """The run that makes a student."""
    if name == "delta_conv":
        return Run(get_preset("default"), steps=5500, learning_rate=2e-2, feature=5e-2)
    return Run(ConvertConfig.load(NEAR), steps=3200, learning_rate=5e-3, feature=1e-2)


def load_data(run: Path, pipe: Any, device: str) -> LatentDataset:
    """All training pictures of step 1, as latents."""
    pictures = load_pictures(run, "train")
    latents = encode(pipe.vae, pictures.images, device).cpu()
    return LatentDataset(latents, [caption(row) for row in pictures.rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=get_args(mini.Student))
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, help="in place of those that take 40 minutes")
    args = parser.parse_args()
    planned = plan_run(args.name)
    steps = args.steps or planned.steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = mini.load_teacher().to(device)
    data = load_data(args.run, pipe, device)
    pipe.unet.set_attn_processor(AttnProcessor())  # on CPU faster to train than the fused one
    convfusion.convert(pipe, planned.blocks)
    progress = iter(track(range(steps), "distilling"))
    result = distill(
        pipe,
        data,
        planned.settings(steps),
        args.run / args.name,
        resume=True,
        on_step=lambda step, terms: next(progress, None),
    )
    if not result.stopped:
        pipe.unet.half()  # as the packaged teacher is
        convfusion.save(pipe, mini.STUDENTS / args.name)


if __name__ == "__main__":
    main()
