"""Step 4: a text-to-image teacher, denoiser and text encoder trained together.

`python teacher.py --run run --steps 16000` trains a `StableDiffusionPipeline` (`--family pixart`: a
`PixArtSigmaPipeline`) on the latents of the training pictures (ε-prediction, Min-SNR γ = 5, EMA)
and writes the EMA weights as `run/teacher` (`run/teacher-pixart`) in diffusers' layout, with a grid
of samples each `--sample-every` steps. It resumes from the state beside it; with a larger `--steps`
it goes on. `--init FOLDER` starts from a pipeline's weights, autoencoder and tokenizer instead,
with a fresh optimiser.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import Schedule, caption, ema_step, fit, load_pictures, weighted
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.utils import make_image_grid
from families import FAMILIES, make_scheduler
from torch.optim.swa_utils import AveragedModel

from convfusion.checkpoint.pipelines import in_dtype
from convfusion.generate import generate

DROP_CAPTION, DROP_DESIGN = 0.1, 0.2
SNR_GAMMA = 5.0


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    """Scaled posterior means of uint8 pictures, [P, C, h, w]."""
    parts = [part.to(device).float().div(127.5).sub(1) for part in images.split(64)]
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    return latents * vae.config.scaling_factor


def picture_weights(rows: list[dict]) -> torch.Tensor:
    """Each (name, design) counts once for its plain picture and once for all its skin tones."""
    toned = Counter((row["name"], row["design"]) for row in rows if row["tone"])
    return torch.tensor(
        [1 / toned[row["name"], row["design"]] if row["tone"] else 1.0 for row in rows]
    )


def min_snr(scheduler: DDIMScheduler) -> torch.Tensor:
    """min(SNR, γ)/SNR per timestep: Min-SNR weighting for ε-prediction."""
    signal = scheduler.alphas_cumprod
    snr = signal / (1 - signal)
    return snr.clamp(max=SNR_GAMMA) / snr


def pipeline(family: Any, vae: AutoencoderKL, tokenizer: Any, parts: Any) -> Any:
    """A diffusers pipeline of the trained parts."""
    return family.pipeline(
        vae=vae,
        text_encoder=parts["text"],
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        **{family.denoiser_name: parts[family.denoiser_name]},
        **family.extras(),
    )


def sample(pipe: Any, prompts: list[str], path: Path, columns: int) -> None:
    images = generate(pipe, prompts, guidance=3.0, batch_size=len(prompts))
    make_image_grid(images, rows=-(-len(images) // columns), cols=columns).save(path)


def grid_prompts(run: Path) -> list[str]:
    """24 training names and 8 held-out ones, evenly spread, designs in turn."""
    prompts = []
    for side, count in (("train", 24), ("held_out", 8)):
        plain = [r for r in load_pictures(run, side).rows if not r["tone"]]
        plain = [r for r in plain if r["design"] == "noto"]
        picks = [dict(plain[(2 * i + 1) * len(plain) // (2 * count)]) for i in range(count)]
        for i, row in enumerate(picks):
            row["design"] = ("noto", "twemoji")[i % 2]
            prompts.append(caption(row))
    return prompts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--family", choices=FAMILIES, default="sd")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--decay-steps", type=int, default=3_500, help="linear to 0 at the end")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-every", type=int, default=500)
    parser.add_argument("--init", type=Path, help="a pipeline folder to start from")
    return parser.parse_args()


def start_from(args: argparse.Namespace, state: Path) -> tuple[AutoencoderKL, Any, Any]:
    """Autoencoder, tokenizer and the two models to train: fresh ones, or those of a pipeline."""
    family = FAMILIES[args.family]
    if args.init is None:
        captions = {caption(row) for row in load_pictures(args.run, "train").rows}
        tokenizer = family.make_tokenizer(args.run, captions)
        vae = AutoencoderKL.from_pretrained(args.run / "vae")
        denoiser, text = family.make_denoiser(), family.make_text_encoder(tokenizer)
    else:
        if state.exists():
            raise SystemExit(f"{state} goes on by itself: move it away to use --init")
        pipe = family.pipeline.from_pretrained(args.init, **in_dtype(torch.float32))
        vae, tokenizer = pipe.vae, pipe.tokenizer
        denoiser, text = pipe.components[family.denoiser_name], pipe.text_encoder
    return vae, tokenizer, torch.nn.ModuleDict({family.denoiser_name: denoiser, "text": text})


class Batches:
    """The batch of each step: a function of the seed and the step alone.

    Args:
        args: with `batch`, the pictures of a step, and `seed`.
        latents: of the training pictures, [P, C, h, w].
        rows: of facts on each.
        device: of what is returned.
    """

    def __init__(
        self, args: argparse.Namespace, latents: torch.Tensor, rows: list[dict], device: str
    ) -> None:
        self.args, self.latents, self.device = args, latents, device
        self.weights = picture_weights(rows)
        self.captions = [[caption(row, design=keep) for keep in (False, True)] for row in rows]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Latents, noise, timesteps and captions of a step."""
        size = self.args.batch
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        picks = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        chance = torch.rand(size, 2, generator=generator).tolist()
        texts = [
            "" if drop < DROP_CAPTION else self.captions[pick][int(keep > DROP_DESIGN)]
            for pick, (drop, keep) in zip(picks.tolist(), chance, strict=True)
        ]
        noise = torch.randn(size, *self.latents.shape[1:], generator=generator)
        t = torch.randint(0, 1000, (size,), generator=generator)
        latents = self.latents[picks.to(self.device)]
        return latents, noise.to(self.device), t.to(self.device), texts


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    run: Path = args.run
    family = FAMILIES[args.family]
    folder = run / ("teacher" if args.family == "sd" else f"teacher-{args.family}")
    kept = folder.with_suffix(".pt")
    vae, tokenizer, parts = start_from(args, kept)
    vae.to(device)
    parts.to(device).train()
    scheduler = make_scheduler()
    pictures = load_pictures(run, "train")
    batches = Batches(args, encode(vae, pictures.images, device), pictures.rows, device)
    loss_weight = min_snr(scheduler).to(device)
    ema = AveragedModel(parts, multi_avg_fn=ema_step)

    def loss(step: int) -> torch.Tensor:
        latents, noise, t, texts = batches(step)
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt").to(device)
        prediction = family.predict(parts, tokens, scheduler.add_noise(latents, noise, t), t)
        return weighted(prediction, noise, loss_weight[t])

    def show(step: int) -> None:
        if step % args.sample_every == 0 or step == args.steps:
            ema.eval()
            pipe = pipeline(family, vae, tokenizer, ema.module)
            sample(pipe, grid_prompts(run), run / f"{folder.name}-{step:06d}.png", columns=8)
            pipe.save_pretrained(folder)

    schedule = Schedule(args.steps, args.decay_steps, args.lr, warmup=300, weight_decay=0.01)
    fit(parts, loss, schedule, kept, average=ema, on_step=show)


if __name__ == "__main__":
    main()
