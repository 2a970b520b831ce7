"""Step 9: the embedded teacher's sibling for 128×128 pixels.

`python large_teacher.py train` goes on from the packaged teacher with the pictures of
`emoji_large.py`: only the transformer blocks are trained (ε-prediction, Min-SNR γ = 5, EMA). It
resumes from `run/large.pt`, and draws a grid of samples at the end. `python large_teacher.py
package` keeps the blocks in float16 in `large/` beside this file, with latents of 192 training
pictures and of 64 of each held-out list, and what the ε-loss was before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import Schedule, caption, ema_step, fit, load_pictures, weighted
from diffusers.models.attention_processor import AttnProcessor
from large import KEPT, block_names, put_blocks
from safetensors.torch import load_file, save_file
from teacher import Batches, encode, grid_prompts, min_snr, sample
from torch.optim.swa_utils import AveragedModel

from convfusion import mini
from convfusion.data import LatentDataset

SIZE = 128  # pixels
TRAIN_PICTURES, HELD_OUT_PICTURES = 192, 64
NOISES = 4  # that the loss of each held-out picture is measured with


def transformer_blocks(unet: torch.nn.Module) -> tuple[list[str], torch.nn.ModuleList]:
    """The names of the transformer blocks, and the blocks themselves."""
    found = dict(unet.named_modules())
    names = sorted({name.rsplit(".transformer_blocks.", 1)[0] for name in block_names(unet)})
    names = [f"{name}.transformer_blocks" for name in names]
    return names, torch.nn.ModuleList(found[name] for name in names)


def tensors_of(names: list[str], blocks: torch.nn.ModuleList) -> dict[str, torch.Tensor]:
    """The tensors of the blocks as the UNet names them."""
    return {
        f"{name}.{key}": tensor
        for name, block in zip(names, blocks, strict=True)
        for key, tensor in block.state_dict().items()
    }


def training_latents(run: Path, vae: Any, images: torch.Tensor, device: str) -> torch.Tensor:
    """Latents [P, 4, 32, 32] of the training pictures, encoded once and kept in the run."""
    path = run / "large-latents.pt"
    if not path.exists():
        torch.save(encode(vae.to(device), images, device), path)
    return torch.load(path, weights_only=True, map_location=device)


def train(run: Path, args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = mini.load_teacher()
    pictures = load_pictures(run, "train", SIZE)
    latents = training_latents(run, pipe.vae, pictures.images, device)
    batches = Batches(args, latents, pictures.rows, device)
    loss_weight = min_snr(pipe.scheduler).to(device)
    pipe.to(device)
    pipe.unet.requires_grad_(False)
    pipe.unet.set_attn_processor(AttnProcessor())
    names, blocks = transformer_blocks(pipe.unet)
    blocks.requires_grad_(True)
    ema = AveragedModel(blocks, multi_avg_fn=ema_step)

    def loss(step: int) -> torch.Tensor:
        latents, noise, t, texts = batches(step)
        noisy = pipe.scheduler.add_noise(latents, noise, t)
        prediction = pipe.unet(noisy, t, embed(pipe, texts), return_dict=False)[0]
        return weighted(prediction, noise, loss_weight[t])

    def show(step: int) -> None:
        if step == args.steps:
            drawing = mini.load_teacher()
            put_blocks(drawing, tensors_of(names, ema.module.cpu()))
            prompts = grid_prompts(run)[::2]  # of one design
            sample(drawing, prompts, run / f"large-{step:06d}.png", columns=8)
            save_file(tensors_of(names, ema.module), run / "large.safetensors")
            made = {"base": mini.teacher_hash(), "steps": args.steps, "batch": args.batch}
            (run / "large.json").write_text(json.dumps(made))

    schedule = Schedule(args.steps, args.decay_steps, args.lr, warmup=100, weight_decay=0.01)
    fit(blocks, loss, schedule, run / "large.pt", average=ema, on_step=show)


@torch.no_grad()
def embed(pipe: Any, texts: list[str]) -> torch.Tensor:
    """Hidden states of captions, [B, L, C]."""
    tokens = pipe.tokenizer(texts, padding="max_length", return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]


@torch.no_grad()
def measure_loss(pipe: Any, data: LatentDataset) -> float:
    """The training's loss on latents with their captions, by equal noises and timesteps."""
    loss_weight = min_snr(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for first in range(0, len(data), 16):
        latents = data.latents[first : first + 16]
        text = embed(pipe, data.captions[first : first + 16])
        for _ in range(NOISES):
            noise = torch.randn(latents.shape, generator=generator)
            t = torch.randint(0, 1000, (len(latents),), generator=generator)
            noisy = pipe.scheduler.add_noise(latents, noise, t)
            prediction = pipe.unet(noisy, t, text, return_dict=False)[0]
            losses.append(weighted(prediction, noise, loss_weight[t]) * len(latents))
    return float(sum(losses)) / (NOISES * len(data))


def choose(run: Path) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Pictures and captions by side: parts of the embedded model's own lists, evenly spread."""
    sides = {"train": mini.training_data()}
    sides |= {part: mini.held_out_data(part) for part in ("choice", "results")}
    chosen = {}
    for side, data in sides.items():
        split = "train" if side == "train" else "held_out"
        pictures = load_pictures(run, split, SIZE)
        number = {caption(row): i for i, row in enumerate(pictures.rows)}
        there = [i for i, text in enumerate(data.captions) if text in number]
        most = TRAIN_PICTURES if side == "train" else HELD_OUT_PICTURES
        texts = [data.captions[there[k * len(there) // most]] for k in range(most)]
        chosen[side] = pictures.images[[number[text] for text in texts]], texts
    return chosen


def package(run: Path) -> None:
    facts = json.loads((run / "large.json").read_text())
    pipe = mini.load_teacher()
    if facts["base"] != mini.teacher_hash():
        raise SystemExit(f"{run / 'large.json'} goes on from another teacher than the packaged one")
    KEPT.mkdir(exist_ok=True)
    latents, facts["captions"] = {}, {}
    for side, (images, texts) in choose(run).items():
        latents[side] = encode(pipe.vae, images, "cpu").half()
        facts["captions"][side] = texts
    save_file(latents, KEPT / "latents.safetensors")
    tensors = {name: each.half() for name, each in load_file(run / "large.safetensors").items()}
    save_file(tensors, KEPT / "blocks.safetensors")
    held_out = LatentDataset(latents["results"].float(), facts["captions"]["results"])
    facts["loss"] = {"before": round(measure_loss(pipe, held_out), 4)}
    put_blocks(pipe, tensors)
    facts["loss"]["after"] = round(measure_loss(pipe, held_out), 4)
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (KEPT / "large.json").write_text(text, encoding="utf-8")
    size = sum(f.stat().st_size for f in KEPT.iterdir())
    print(f"{size / 1e6:.1f} MB, ε-loss {facts['loss']['before']} → {facts['loss']['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    commands = parser.add_subparsers(dest="command", required=True)
    option = commands.add_parser("train").add_argument
    option("--steps", type=int, default=750)
    option("--decay-steps", type=int, default=250, help="linear to 0 at the end")
    option("--batch", type=int, default=8)
    option("--lr", type=float, default=3e-4)
    option("--seed", type=int, default=0)
    commands.add_parser("package")
    args = parser.parse_args()
    if args.command == "train":
        train(args.run, args)
    else:
        package(args.run)


if __name__ == "__main__":
    main()
