"""Blocks of one base put into a fine-tune of it: do they fit there, and what does distilling bring?

`python recipes/another_base.py` fine-tunes the embedded teacher on one of the two designs that it
knows. Halo blocks and ΔConvBlocks, which `rivals.py` distilled from the base for 100 steps, go into
the fine-tune as they are, and are then distilled on; fresh blocks of the same kind are distilled
for as long. ε-errors against the fine-tune itself, on held-out names of its design, go to
`results/another_base.csv`, beside those of the blocks in their own base, and the distance of the
two bases.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from convfusion import convert, load, mini
from convfusion.data import LatentDataset
from convfusion.demo import configure_distillation, measure_error
from convfusion.distill import distill
from convfusion.evaluate import epsilon_error
from convfusion.families import encode_conditioning
from convfusion.schedule import noise_schedule
from experiment import KEPT, Recipe, Table, digest, student_folder, weights_of
from rivals import HALO, OURS, blocks_of, rate_of, rival

KEYS = ("variant", "blocks", "design", "tuning_steps", "steps", "made")
TABLE = Table("another_base.csv", KEYS, "results")
BASE, NOTHING = "the base itself", "nothing"
OWN, AS_IS, ON, FRESH = "in their own base", "as they are", "distilled on", "fresh"
TRAINED = 100  # steps of the blocks in their own base
Row = dict[str, str]


def of_design(data: LatentDataset, design: str) -> LatentDataset:
    """The samples whose caption names the design."""
    picks = [i for i, caption in enumerate(data.captions) if caption.endswith(f", {design}")]
    return LatentDataset(data.latents[picks], [data.captions[i] for i in picks])


def fine_tune(design: str, steps: int) -> Any:
    """The teacher, trained on with pictures of one design alone; kept for the next time."""
    pipe = mini.load_teacher()
    file = KEPT / "fine-tunes" / f"{digest(weights_of('mini'), design, steps)}.safetensors"
    if not file.is_file():
        train(pipe, of_design(mini.training_data(), design), steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(pipe.unet.state_dict(), file)
    pipe.unet.load_state_dict(load_file(file))
    return pipe


def train(pipe: Any, data: LatentDataset, steps: int) -> None:
    """The usual loss ‖ε − ε̂‖² on batches of 32; every weight of the denoiser learns."""
    schedule = noise_schedule(pipe.scheduler, pipe.unet)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    pipe.unet.train()
    for _ in range(steps):
        picks = torch.randint(len(data), (32,), generator=generator)
        noise = torch.randn(32, *data.latents.shape[1:], generator=generator)
        timesteps = torch.randint(1000, (32,), generator=generator)
        with torch.no_grad():
            told = encode_conditioning(pipe, [data.captions[i] for i in picks], (64, 64))
        noisy = schedule.add_noise(data.latents[picks], noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            found = pipe.unet(noisy, timestep=timesteps, return_dict=False, **told)[0]
        loss = F.mse_loss(found.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe.unet.eval()


def measured(variant: str, blocks: str, design: str, tuning: int, steps: int) -> Row:
    """The ε-error of one variant against the model whose attention it replaces."""
    held_out = of_design(mini.held_out_data("results"), design)
    base = mini.load_teacher() if variant == OWN else fine_tune(design, tuning)
    if variant == BASE:
        found = epsilon_error(mini.load_teacher(), base.unet, held_out.latents, held_out.captions)
        return {"epsilon_error": f"{found:.4e}"}
    if variant == FRESH or not blocks:
        convert(base, blocks_of("mini", blocks or "nothing"))
    else:
        load(base, student_folder("mini", how(blocks)))
    if steps:
        config = replace(configure_distillation(steps), learning_rate=rate_of("mini", blocks))
        if variant == ON:  # they imitate well already
            rate = config.learning_rate / 4
            config = replace(config, start="converted", imitation_steps=0, learning_rate=rate)
        distill(base, of_design(mini.training_data(), design), config)
    return {"epsilon_error": f"{measure_error(base, held_out):.4e}"}


def how(blocks: str) -> Recipe:
    """How the blocks were distilled in their own base."""
    return rival("mini", blocks, 0, TRAINED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--design", choices=("noto", "twemoji"), default="noto")
    parser.add_argument("--tuning-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="*", default=[50, 200])
    args = parser.parse_args()
    variants = [(BASE, "", 0), (NOTHING, "", 0)]
    for blocks in (HALO, OURS):
        variants += [(OWN, blocks, 0), (AS_IS, blocks, 0)]
        variants += [(kind, blocks, steps) for kind in (ON, FRESH) for steps in args.steps]
    for variant, blocks, steps in variants:
        key = (variant, blocks, args.design, args.tuning_steps, steps)
        made = how(blocks).made("mini") if blocks else weights_of("mini")
        TABLE.once(partial(measured, *key), *key, made)


if __name__ == "__main__":
    main()
