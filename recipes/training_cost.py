"""What the paper's recipe takes on a model of Stable Diffusion 1.5's size.

`python recipes/training_cost.py` counts the operations of one training step on such a UNet with
random weights, in about two minutes on a CPU, and writes `results/training_cost.csv`: the
operations, and the hours of a machine that does 10¹⁴ of them in a second. The time on your own
machine is what `convfusion distill --dry-run` measures.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

import convfusion
from convfusion.bench.models import bench_model
from convfusion.bench.runs import with_random_weights
from convfusion.distill import DistillTask
from convfusion.families import example_inputs
from convfusion.operations import MORE
from convfusion.surgery import mixers_of
from pages import write

STEPS, BATCH = 60_000, 16  # of the paper's recipe for SD1.5
PER_SECOND = 1e14  # operations, about what an A100 sustains of its 3.1e14 in half precision


def count_step(size: int) -> dict[str, Any]:
    """Operations of one training step on one sample of size×size pixels."""
    model = bench_model("sd15")
    unet = with_random_weights(model.denoiser, torch.device("cpu"), torch.float32)
    convfusion.convert(unet)
    task = DistillTask(unet, DDIMScheduler())
    blocks = [p for m in mixers_of(unet).values() for p in m.requires_grad_(True).parameters()]
    latents = model.latents((size, size))
    noise = torch.randn(2, 1, 4, *latents)
    text = {"encoder_hidden_states": example_inputs(unet, latents)["encoder_hidden_states"]}
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        terms, _ = task(*noise, torch.tensor([500]), text)
        torch.stack(list(terms.values())).sum().backward()
    return {
        "model": "sd15",
        "size": f"{size}x{size}",
        "trained_parameters": sum(p.numel() for p in blocks),
        "frozen_parameters": sum(p.numel() for p in unet.parameters() if not p.requires_grad),
        "operations_per_sample": counter.get_total_flops(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    row = count_step(arguments.size)
    samples = STEPS * BATCH
    row |= {
        "steps": STEPS,
        "batch_size": BATCH,
        "hours_at_1e14": round(samples * row["operations_per_sample"] / PER_SECOND / 3600, 1),
    }
    write("training_cost.csv", [row])
    print(row)


if __name__ == "__main__":
    main()
