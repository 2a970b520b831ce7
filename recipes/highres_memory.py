"""What one pass takes: a denoiser of Stable Diffusion 1.5's size, or its largest site alone.

The commands `forward` and `site` of `recipes/highres.py`. Each measures in a process of its own,
with random weights, and adds a row to `results/highres.csv` unless it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import convfusion
from convfusion.families import example_inputs, list_sites
from convfusion.highres.peaks import GIB, estimate_denoiser_peak
from convfusion.highres.savings import chunk_feed_forward
from convfusion.operations import peak_bytes
from convfusion.surgery import mixers_of, presets
from pages import add, has

FILE = "highres.csv"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else freed tensors below 32 MiB stay with glibc
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "small": {
        "sample_size": 64,
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
    },
}


def without_values(name: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """A converted UNet without attention and without values."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[name])
    convfusion.convert(unet, presets.choose_preset(unet))
    convfusion.drop_attention(unet)
    return unet.to(dtype).eval()


def filled(module: nn.Module, device: str) -> Any:
    """A module of meta with random weights, which never take more than their dtype."""
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return module


def largest_site(unet: UNet2DConditionModel) -> Any:
    """Of the blocks with the most tokens, the one with the largest kernels."""
    blocks = mixers_of(unet)
    top = [blocks[site.path] for site in list_sites(unet) if site.level == 0]
    return max(top, key=lambda block: block.config.kernel_size)


def one_pass(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """Peaks of a denoiser's pass on one sample of latents of (height, width)."""
    unet = without_values(args.model, DTYPES[args.dtype])
    with ExitStack() as stack:
        if args.chunks:
            stack.enter_context(chunk_feed_forward(unet, size))
        estimate = estimate_denoiser_peak(unet, size, batch=1)
        if args.estimate:
            return peaks(unet, estimate, None)
        filled(unet, args.device)

        def run() -> Tensor:
            return unet(**example_inputs(unet, size, device=args.device))[0]

        return peaks(unet, estimate, measured(run, args.device))


def one_site(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """The same of the largest site's block alone; tokens in and out count."""
    dtype = DTYPES[args.dtype]
    block = largest_site(without_values(args.model, dtype))
    shape = (1, size[0] * size[1], block.proj_in.in_features)
    estimate = peak_bytes(block, torch.empty(shape, dtype=dtype, device="meta"), size) / GIB
    filled(block, args.device)

    def run() -> Tensor:
        generator = torch.Generator(args.device).manual_seed(0)
        tokens = torch.randn(shape, dtype=dtype, device=args.device, generator=generator)
        return block(tokens, size)

    return peaks(block, estimate, measured(run, args.device))


def peaks(module: nn.Module, estimate: float, measured: float | None) -> dict[str, Any]:
    """Cells of a row, in GiB."""
    return {
        "estimated_gib": round(estimate, 3),
        "measured_gib": "" if measured is None else round(measured, 3),
        "weights_gib": round(sum(p.nbytes for p in module.parameters()) / GIB, 3),
    }


@torch.no_grad()
def measured(run: Callable[[], Tensor], device: str) -> float:
    """How much more than before is held at the worst moment of a run, in GiB."""
    held = start_of_peak(device)
    output = run()
    most = peak(device)
    if not all(part.isfinite().all() for part in output.flatten().split(2**24)):
        raise SystemExit("the output is not finite")
    return (most - held) / GIB


def start_of_peak(device: str) -> int:
    """Forget the peak so far; what is held now, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return from_status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else from_status("VmHWM")


def from_status(field: str) -> int:
    """A field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(args: argparse.Namespace) -> None:
    """One row of the table, measured in a process of its own."""
    height, width = args.height or args.side, args.side
    key = {"model": args.model, "part": args.part, "size": f"{width}x{height}"}
    key |= {"dtype": args.dtype, "feed_forward": "chunks" if args.chunks else "whole"}
    key |= {"device": device_name(args.device)}
    if args.here:
        one = one_pass if args.part == "denoiser" else one_site
        print(json.dumps(one(args, (height // 8, width // 8))))
        return
    if has(FILE, key):
        print("there already:", *key.values())
        return
    command = [sys.executable, *sys.argv, "--here"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if said.returncode:
        sys.exit((said.stderr.strip() or f"it ended with {said.returncode}").splitlines()[-1])
    facts = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    facts["threads"] = torch.get_num_threads()
    row = {**key, **json.loads(said.stdout), **facts}
    if not args.dry:
        add(FILE, row)
    print(json.dumps(row))


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def add_commands(commands: Any) -> None:
    """`forward` and `site` for a command line."""
    for name, part in (("forward", "denoiser"), ("site", "largest site")):
        one = commands.add_parser(name)
        one.set_defaults(run=measure, part=part, chunks=False)
        one.add_argument("--model", choices=MODELS, default="sd15")
        one.add_argument("--side", type=int, default=1024, help="width in pixels; 8 are a latent")
        one.add_argument("--height", type=int, help="default: as the width")
        one.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        one.add_argument("--device", default="cpu")
        one.add_argument("--dry", action="store_true", help="print, but write no row")
        one.add_argument("--here", action="store_true", help="measure in this process, no row")
        if part == "denoiser":
            one.add_argument("--chunks", action="store_true", help="feed-forward layers in chunks")
            one.add_argument("--estimate", action="store_true", help="from shapes, without running")
