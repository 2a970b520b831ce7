"""Large pictures, measured: memory of one pass, ways to climb a rung, pictures, and distances.

`python recipes/highres.py forward --side 4096` takes one pass of a converted denoiser of Stable
Diffusion 1.5's size, and `site` one of its largest site alone: `results/highres.csv`. `rungs`
climbs one rung in several ways and compares with the picture below and, where there is one, with
the true picture: `results/highres_rungs.csv`. `pictures` draws `docs/images/highres.png`.
`distances` compares sets of large pictures: `results/highres_distances.csv`. `errors` measures the
student's ε-error on them: `results/highres_errors.csv`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import highres_distances
import highres_memory
from convfusion import mini
from convfusion.data.pictures import encode_pictures
from convfusion.evaluate import kernel_distance, open_extractor
from convfusion.evaluate.extractors import Extractor
from convfusion.families import denoiser_of, latent_scale
from convfusion.fingerprint import fingerprint
from convfusion.generate import generate
from convfusion.highres import Ladder, Start, highres
from convfusion.highres.ladder import keep_last_steps
from convfusion.report import draw_grid
from highres_distances import LOAD
from pages import ROOT, add, has

FILE = "highres_rungs.csv"
STRENGTHS = (0.1, 0.2, 0.3, 0.4)
CLIMBS = [  # what is enlarged, strength, guidance
    ("the true picture", 0.0, 1.0),
    ("Lanczos alone", 0.0, 1.0),  # with a strength of 0 the model draws nothing
    ("pixels", 0.0, 1.0),
    ("latents", 0.3, mini.GUIDANCE),
    *(
        (way, strength, guidance)
        for way in ("pixels", "pixels, low kept")
        for guidance in (mini.GUIDANCE, 1.0)
        for strength in STRENGTHS
    ),
]


@torch.no_grad()
def rungs(args: argparse.Namespace) -> None:
    """From 32 pixels to 64, where the truth is known, and on to 128, beyond the training."""
    pipe, data = LOAD[args.model](), mini.held_out_data("choice")
    places = np.linspace(0, len(data) - 1, args.pictures).round().astype(int)
    weights, extractor = fingerprint(denoiser_of(pipe)), open_extractor()
    for side, chosen in ((64, places), (128, places[::2])):  # the larger take four times as long
        truth = decoded(pipe, data.latents[chosen])
        small = truth if side == 128 else F.avg_pool2d(truth, 2).round()
        prompts = [data.captions[i] for i in chosen]
        for way, strength, guidance in CLIMBS:
            key = {"to": str(side), "enlarged": way, "strength": str(strength)}
            key |= {"guidance": str(guidance), "model": args.model}
            key |= {"pictures": str(len(chosen)), "weights": weights}
            key["held_out"] = "choice"
            if has(FILE, key) or (side == 128 and (way == "the true picture" or strength > 0.3)):
                continue
            drawn = truth
            if way != "the true picture":
                drawn = climbed(pipe, small, prompts, way, strength, guidance)
            row = key | compared(drawn, small, truth if side == 64 else None, extractor)
            if not args.dry:
                add(FILE, row)
            print(*row.values(), flush=True)


def compared(
    drawn: Tensor, small: Tensor, truth: Tensor | None, extractor: Extractor
) -> dict[str, str]:
    """What a rung made, against the pictures below it, those merely enlarged, and the true ones."""
    row = {
        "psnr_below": f"{mean_psnr(F.avg_pool2d(drawn, 2), small):.2f}",
        "sharpness": f"{sharpness(drawn) / sharpness(larger(small)):.3f}",
        "psnr_truth": "",
        "kernel_truth": "",
    }
    if truth is not None:
        row["psnr_truth"] = f"{mean_psnr(drawn, truth):.2f}"
        seen = [extractor(map(Image.fromarray, bytes_of(m))).features for m in (drawn, truth)]
        row["kernel_truth"] = f"{kernel_distance(*seen).value:.5f}"
    return row


def climbed(
    pipe: Any, small: Tensor, prompts: list[str], way: str, strength: float, guidance: float
) -> Tensor:
    """What a rung of 25 steps makes of pictures [B, 3, h, w] in 0…255: [B, 3, 2h, 2w]."""
    if way == "Lanczos alone":
        return larger(small)
    if way == "latents":
        clean = F.interpolate(encoded(pipe, small), scale_factor=2, mode="bicubic")
    else:
        clean = encoded(pipe, larger(small))
    if not strength:
        return decoded(pipe, clean)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    height, width = clean.shape[-2:]
    start, scale = Start(clean, noise, (height // 2, width // 2)), latent_scale(pipe)
    kept = start if "kept" in way else None
    with keep_last_steps(pipe, 25, round(25 * strength), start=kept) as scheduler:
        noisy = start.add_noise(scheduler, scheduler.timesteps[0])
        drawn = generate(
            pipe, prompts, size=(height * scale, width * scale), guidance=guidance,
            latents=noisy, batch_size=len(noisy),
        )  # fmt: skip
    return as_maps(drawn)


def larger(small: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] in 0…255 at twice their size, enlarged as the ladder does it."""
    size = (2 * small.shape[-1], 2 * small.shape[-2])
    images = map(Image.fromarray, bytes_of(small))
    return as_maps([image.resize(size, Image.Resampling.LANCZOS) for image in images])


def encoded(pipe: Any, maps: Tensor) -> Tensor:
    return encode_pictures(pipe.vae, bytes_of(maps))


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """The pictures of scaled latents, as bytes hold them: [B, 3, H, W] in 0…255."""
    found = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return ((found + 1) * 127.5).clamp(0, 255).round()


def bytes_of(maps: Tensor) -> np.ndarray:
    """Pictures [B, 3, H, W] in 0…255 as [B, H, W, 3]."""
    return maps.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def as_maps(images: list[Image.Image]) -> Tensor:
    """Pictures as [B, 3, H, W] in 0…255."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


def mean_psnr(pictures: Tensor, references: Tensor) -> float:
    """Mean over pairs, in dB; equal pairs count as if they differed by less than bytes can."""
    errors = (pictures - references).square().flatten(1).mean(dim=1).clamp(min=1e-2)
    return (10 * (255**2 / errors).log10()).mean().item()


def sharpness(maps: Tensor) -> float:
    """Root mean square of what 2×2 means take away."""
    smooth = F.interpolate(F.avg_pool2d(maps, 2), scale_factor=2, mode="nearest")
    return (maps - smooth).square().mean().sqrt().item()


def pictures(args: argparse.Namespace) -> None:
    """The mini teacher and student at their own size, and at 2 and 4 times it by the ladder."""
    prompts = (ROOT / "recipes" / "mini" / "prompts.txt").read_text().splitlines()[: args.pictures]
    ladder, much = Ladder(strength=args.strength), Ladder(strength=0.3, guidance=mini.GUIDANCE)
    rows = {}
    for name, load in LOAD.items():
        pipe = load()
        climbs = [(64 * factor, ladder, "") for factor in (1, 2, 4)]
        if name == "student":
            climbs.append((256, much, f", strength {much.strength}, guidance {much.guidance:g}"))
        for side, chosen, note in climbs:
            drawn = highres(pipe, prompts, (side, side), guidance=mini.GUIDANCE, ladder=chosen)
            rows[f"{name}, {side} pixels{note}"] = [
                image.resize((256, 256), Image.Resampling.NEAREST) for image in drawn
            ]
            print("drawn:", name, side, flush=True)
    path = args.out or ROOT / "docs" / "images" / "highres.png"
    draw_grid(rows, prompts).save(path, optimize=True)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    highres_memory.add_commands(commands)
    climb = commands.add_parser("rungs")
    climb.set_defaults(run=rungs)
    climb.add_argument("--model", choices=LOAD, default="student")
    climb.add_argument("--pictures", type=int, default=16)
    climb.add_argument("--dry", action="store_true", help="print, but write no row")
    draw = commands.add_parser("pictures")
    draw.set_defaults(run=pictures)
    draw.add_argument("--pictures", type=int, default=4)
    draw.add_argument("--strength", type=float, default=mini.STRENGTH)
    draw.add_argument("--out", type=Path)
    highres_distances.add_commands(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
