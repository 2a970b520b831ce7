"""What the paper's recipe takes on a model of Stable Diffusion 1.5's size.

`python recipes/training_cost.py` takes a few training steps on such a UNet with random weights,
which take as long as trained ones, counts the operations of a step, and writes
`results/training_cost.csv`: the time on this machine, measured, and the time on a machine that does
10¹⁴ operations in a second, worked out.
"""

from __future__ import annotations

import argparse
import statistics
import time
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


def measure(size: int, tries: int) -> dict[str, Any]:
    """Seconds and operations of one training step on one sample of size×size pixels."""
    model = bench_model("sd15")
    unet = with_random_weights(model.denoiser, torch.device("cpu"), torch.float32)
    convfusion.convert(unet)
    task = DistillTask(unet, DDIMScheduler())
    blocks = [p for m in mixers_of(unet).values() for p in m.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(blocks)
    latents = model.latents((size, size))
    noise = torch.randn(2, 1, 4, *latents)
    text = {"encoder_hidden_states": example_inputs(unet, latents)["encoder_hidden_states"]}

    def step() -> None:
        terms, _ = task(*noise, torch.tensor([500]), text)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        step()
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {
        "model": "sd15",
        "size": f"{size}x{size}",
        "trained_parameters": sum(p.numel() for p in blocks),
        "frozen_parameters": sum(p.numel() for p in unet.parameters() if not p.requires_grad),
        "threads": torch.get_num_threads(),
        "seconds_per_sample": round(statistics.median(seconds), 2),
        "operations_per_sample": counter.get_total_flops(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--tries", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    row = measure(arguments.size, arguments.tries)
    samples = STEPS * BATCH
    row |= {
        "steps": STEPS,
        "batch_size": BATCH,
        "days_here": round(samples * row["seconds_per_sample"] / 86400, 1),
        "hours_at_1e14": round(samples * row["operations_per_sample"] / PER_SECOND / 3600, 1),
    }
    write("training_cost.csv", [row])
    print(row)


if __name__ == "__main__":
    main()
