"""What a distillation step holds: one copy of the frozen weights, or a teacher beside a student.

`python recipes/memory.py` takes one step on a UNet of Stable Diffusion 1.5's size with random
weights in both ways, each in a fresh process, and writes `results/memory.csv`. The second way is
that of the reference code: two full models, the student without its self-attention.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import convfusion
from convfusion.distill import DistillTask
from convfusion.surgery import mixers_of, presets
from pages import write

WAYS = ("one copy", "two models")


class TwoModels(DistillTask):
    """Teacher and student as separate full models; the student's attention is dropped."""

    def __init__(self, student: Any, teacher: Any, scheduler: Any) -> None:
        super().__init__(student, scheduler)
        self._unregistered = (teacher,)
        convfusion.drop_attention(student)


def step(way: str, latents: int, checkpointing: bool) -> dict[str, Any]:
    """One forward and backward pass and AdamW step; what was held, and the peak."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.requires_grad_(False)
    teacher = copy.deepcopy(unet) if way == "two models" else None
    convfusion.convert(unet, presets.get_preset("sd15"))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    task = (
        TwoModels(unet, teacher, DDIMScheduler()) if teacher else DistillTask(unet, DDIMScheduler())
    )
    trained = [p for m in mixers_of(unet).values() for p in m.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(trained)
    noise = torch.randn(2, 1, 4, latents, latents)
    text = {"encoder_hidden_states": torch.randn(1, 77, 768)}
    terms, _ = task(*noise, torch.tensor([500]), text)
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    held = {p.data_ptr(): p for model in (unet, task.teacher) for p in model.parameters()}
    return {
        "parameters": sum(p.numel() for p in held.values()),
        "trained": sum(p.numel() for p in trained),
        "peak_gib": round(peak() / 2**30, 3),
    }


def peak() -> int:
    """The high-water mark of this process's memory in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at the parent's peak
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=32, help="side; 64 is 512 pixels")
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(step(args.way, args.latents, args.checkpointing)))
        return
    rows = []
    for checkpointing in (False, True):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--latents", str(args.latents)]
            command += ["--checkpointing"] * checkpointing
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"way": way, "checkpointing": checkpointing, **json.loads(said)})
            print(rows[-1], flush=True)
    facts = {"latents": args.latents, "dtype": "float32", "device": "cpu"}
    facts |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    write("memory.csv", [{**row, **facts} for row in rows])


if __name__ == "__main__":
    main()
