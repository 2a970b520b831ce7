"""Large pictures, measured: memory of one pass, ways to climb a rung, and pictures.

`python recipes/highres.py forward --side 4096` takes one pass of a converted denoiser of Stable
Diffusion 1.5's size, without its attention and with random weights, in a fresh process, and adds a
row to `results/highres.csv` unless it is there. `rungs` climbs one rung in several ways and
compares with the picture below and, where there is one, with the true picture:
`results/highres_rungs.csv`. `pictures` draws `docs/images/highres.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

import convfusion
from convfusion import mini, presets
from convfusion.adapters import denoiser_of
from convfusion.budget import chunked_feed_forward
from convfusion.conditioning import latent_scale
from convfusion.data.pictures import encode_pictures
from convfusion.fingerprint import fingerprint
from convfusion.generate import generate
from convfusion.highres import Ladder, Start, highres, last_steps
from convfusion.inputs import example_inputs
from convfusion.memory import GIB, denoiser_peak
from convfusion.report import labelled_grid

ROOT = Path(__file__).parent.parent
FORWARD, RUNGS = ROOT / "results" / "highres.csv", ROOT / "results" / "highres_rungs.csv"
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


def random_model(name: str, dtype: torch.dtype, device: str) -> UNet2DConditionModel:
    """A converted UNet without attention; random weights that never take more than their dtype."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[name])
    convfusion.convert(unet, presets.preset_for(unet))
    convfusion.drop_attention(unet)
    unet = unet.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return unet


@torch.no_grad()
def one_pass(
    name: str, size: tuple[int, int], dtype: str, device: str, chunks: bool
) -> dict[str, Any]:
    """Estimated and measured peak of activations in GiB, and seconds, of one sample's pass."""
    unet = random_model(name, DTYPES[dtype], device)
    latents = (size[0] // 8, size[1] // 8)
    with ExitStack() as stack:
        if chunks:
            stack.enter_context(chunked_feed_forward(unet, latents))
        estimate = denoiser_peak(unet, latents, batch=1)
        held = start_of_peak(device)
        started = time.perf_counter()
        output = unet(**example_inputs(unet, latents, device=device))[0]
        finite = bool(output.isfinite().all())
        seconds = time.perf_counter() - started
    if not finite:
        raise SystemExit("the output is not finite")
    return {
        "estimated_gib": round(estimate, 3),
        "measured_gib": round((peak(device) - held) / GIB, 3),
        "weights_gib": round(sum(p.nbytes for p in unet.parameters()) / GIB, 3),
        "seconds": round(seconds, 2),
    }


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


def forward(args: argparse.Namespace) -> None:
    """One row of the table of passes, measured in a process of its own."""
    height, width = args.height or args.side, args.side
    key = {"model": args.model, "size": f"{width}x{height}", "dtype": args.dtype}
    key |= {"feed_forward": "chunks" if args.chunks else "whole", "device": device_name(args)}
    if args.here:
        print(
            json.dumps(one_pass(args.model, (height, width), args.dtype, args.device, args.chunks))
        )
        return
    if any(key.items() <= row.items() for row in read(FORWARD)):
        print("there already:", *key.values())
        return
    command = [sys.executable, *sys.argv, "--here"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if said.returncode:
        sys.exit(said.stderr.strip().splitlines()[-1])
    facts = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    facts["threads"] = torch.get_num_threads()
    row = {**key, **json.loads(said.stdout), **facts}
    if not args.dry:
        add(FORWARD, row)
    print(json.dumps(row))


def device_name(args: argparse.Namespace) -> str:
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def enlarged(pipe: Any, small: Tensor, way: str) -> Start:
    """What a rung starts from, by pictures [B, 3, h, w] in 0…255 of half its size."""

    def encoded(pictures: Tensor) -> Tensor:
        pixels = pictures.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
        return encode_pictures(pipe.vae, pixels)

    if way == "latents":
        clean = F.interpolate(encoded(small), scale_factor=2, mode="bicubic")
    else:
        clean = encoded(F.interpolate(small, scale_factor=2, mode="bicubic"))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    height, width = clean.shape[-2:]
    return Start(clean, noise, (height // 2, width // 2))


@torch.no_grad()
def rungs(args: argparse.Namespace) -> None:
    """From 32 pixels to 64, where the truth is known, and on to 128, beyond the training."""
    pipe, data = mini.load_student(), mini.held_out_data()
    places = np.linspace(0, len(data) - 1, args.pictures).round().astype(int).tolist()
    prompts = [data.captions[i] for i in places]
    decoded = pipe.vae.decode(data.latents[places] / pipe.vae.config.scaling_factor).sample
    truth = ((decoded + 1) * 127.5).clamp(0, 255)
    weights = fingerprint(denoiser_of(pipe))
    for small, reference in ((F.avg_pool2d(truth, 2), truth), (truth, None)):
        for way in ("pixels", "pixels, low kept", "latents"):
            start = enlarged(pipe, small, way)
            for strength in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8):
                key = {"to": str(2 * small.shape[-1]), "enlarged": way, "strength": str(strength)}
                key |= {"pictures": str(args.pictures), "weights": weights}
                if any(key.items() <= row.items() for row in read(RUNGS)):
                    continue
                drawn = as_maps(climbed(pipe, start, prompts, strength, "kept" in way))
                plain = F.interpolate(small, scale_factor=2, mode="bicubic")
                row = key | {
                    "psnr_truth": "" if reference is None else f"{mean_psnr(drawn, reference):.2f}",
                    "psnr_below": f"{mean_psnr(F.avg_pool2d(drawn, 2), small):.2f}",
                    "sharpness": f"{sharpness(drawn) / sharpness(plain):.3f}",
                }
                if not args.dry:
                    add(RUNGS, row)
                print(*row.values(), flush=True)


def climbed(
    pipe: Any, start: Start, prompts: list[str], strength: float, keep: bool
) -> list[Image.Image]:
    """What a rung of 25 steps makes of a start."""
    scale = latent_scale(pipe)
    height, width = start.clean.shape[-2:]
    with last_steps(pipe, 25, round(25 * strength), start=start if keep else None) as scheduler:
        noisy = start.noisy(scheduler, scheduler.timesteps[0])
        return generate(
            pipe, prompts, size=(height * scale, width * scale), guidance=mini.GUIDANCE,
            latents=noisy, batch_size=len(noisy),
        )  # fmt: skip


def as_maps(images: list[Image.Image]) -> Tensor:
    """Pictures as [B, 3, H, W] in 0…255."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


def mean_psnr(pictures: Tensor, references: Tensor) -> float:
    """Mean over pairs, in dB."""
    errors = (pictures - references).square().flatten(1).mean(dim=1)
    return (10 * (255**2 / errors).log10()).mean().item()


def sharpness(maps: Tensor) -> float:
    """Root mean square of what 2×2 means take away."""
    smooth = F.interpolate(F.avg_pool2d(maps, 2), scale_factor=2, mode="nearest")
    return (maps - smooth).square().mean().sqrt().item()


def pictures(args: argparse.Namespace) -> None:
    """The mini teacher and student at their own size, and at 2 and 4 times it by the ladder."""
    prompts = (ROOT / "recipes" / "mini" / "prompts.txt").read_text().splitlines()[: args.pictures]
    rows = {}
    for name, load in (("teacher", mini.load_teacher), ("student", mini.load_student)):
        pipe = load()
        for factor in (1, 2, 4):
            drawn = highres(
                pipe, prompts, (64 * factor,) * 2, guidance=mini.GUIDANCE,
                ladder=Ladder(strength=args.strength),
            )  # fmt: skip
            rows[f"{name}, {64 * factor} pixels"] = [
                image.resize((256, 256), Image.Resampling.NEAREST) for image in drawn
            ]
            print("drawn:", name, factor, flush=True)
    path = args.out or ROOT / "docs" / "images" / "highres.png"
    labelled_grid(rows, prompts).save(path, optimize=True)
    print(path)


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: dict[str, Any]) -> None:
    new = not path.is_file()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("forward")
    one.set_defaults(run=forward)
    one.add_argument("--model", choices=MODELS, default="sd15")
    one.add_argument("--side", type=int, default=1024, help="width in pixels; 8 are a latent")
    one.add_argument("--height", type=int, help="default: as the width")
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    one.add_argument("--device", default="cpu")
    one.add_argument("--chunks", action="store_true", help="feed-forward layers in chunks")
    one.add_argument("--here", action="store_true", help="measure in this process, write nothing")
    climb = commands.add_parser("rungs")
    climb.set_defaults(run=rungs)
    climb.add_argument("--pictures", type=int, default=64)
    draw = commands.add_parser("pictures")
    draw.set_defaults(run=pictures)
    draw.add_argument("--pictures", type=int, default=4)
    draw.add_argument("--strength", type=float, default=Ladder().strength)
    draw.add_argument("--out", type=Path)
    for command in (one, climb):
        command.add_argument("--dry", action="store_true", help="print, but write no row")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
