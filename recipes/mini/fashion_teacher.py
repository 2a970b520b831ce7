"""Step 8: the third teacher, a class-conditional DiT on Fashion-MNIST.

`python fashion_teacher.py vae` trains its autoencoder, `python fashion_teacher.py teacher` the
transformer (ε-prediction, Min-SNR γ = 5, EMA, a tenth of the classes dropped) with a grid of
samples each `--sample-every` steps, and `python fashion_teacher.py package` keeps both in float16
in `fashion/` beside this file. Both trainings resume from `run/fashion`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import vae as autoencoder
from common import Schedule, ema_step, fit, weighted
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import make_image_grid
from families import make_scheduler
from fashion import CLASSES, KEPT, read_pictures
from teacher import encode, min_snr
from torch.optim.swa_utils import AveragedModel

from convfusion.checkpoint.pipelines import in_dtype
from convfusion.generate import generate

DROP_CLASS = 0.1


def make_transformer() -> DiTTransformer2DModel:
    """3.5M parameters, started as DiT starts: with blocks that change nothing."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,  # no learned variance
        num_layers=8,
        num_embeds_ada_norm=len(CLASSES),
        sample_size=8,
        patch_size=1,
    )
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        block.attn1.set_processor(AttnProcessor())  # on CPU faster to train than the fused one
    torch.nn.init.zeros_(transformer.proj_out_2.weight)
    torch.nn.init.zeros_(transformer.proj_out_2.bias)
    # In training mode each block would drop the class for itself: it is dropped for all at once.
    return transformer.eval()


def train_teacher(run: Path, args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(run / "vae").to(device)
    images, labels = read_pictures("train")
    latents, classes = encode(vae, images, device), torch.tensor(labels, device=device)
    scheduler = make_scheduler()
    loss_weight = min_snr(scheduler).to(device)
    transformer = make_transformer().to(device)
    ema = AveragedModel(transformer, multi_avg_fn=ema_step)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picks = torch.randint(len(latents), (args.batch,), generator=generator).to(device)
        dropped = torch.rand(args.batch, generator=generator).to(device) < DROP_CLASS
        noise = torch.randn(args.batch, 4, 8, 8, generator=generator).to(device)
        t = torch.randint(0, 1000, (args.batch,), generator=generator).to(device)
        told = classes[picks].masked_fill(dropped, len(CLASSES))
        noisy = scheduler.add_noise(latents[picks], noise, t)
        prediction = transformer(noisy, t, told, return_dict=False)[0]
        return weighted(prediction, noise, loss_weight[t])

    def show(step: int) -> None:
        if step % args.sample_every == 0 or step == args.steps:
            names = dict(enumerate(CLASSES))
            pipe = DiTPipeline(ema.module, vae, scheduler, id2label=names)
            drawn = generate(pipe, list(CLASSES) * 8, guidance=1.0, batch_size=80)
            make_image_grid(drawn, rows=8, cols=10).save(run / f"teacher-{step:06d}.png")
            pipe.save_pretrained(run / "teacher")

    schedule = Schedule(args.steps, args.decay_steps, args.lr, warmup=300, weight_decay=0.01)
    fit(transformer, loss, schedule, run / "teacher.pt", average=ema, on_step=show)


def package(run: Path) -> None:
    pipe = DiTPipeline.from_pretrained(run / "teacher", **in_dtype(torch.float16))
    shutil.rmtree(KEPT, ignore_errors=True)
    pipe.save_pretrained(KEPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run/fashion"))
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("vae").add_argument
    steps("--steps", type=int, default=1100)
    steps("--decay-steps", type=int, default=600, help="linear to 0 at the end")
    option = commands.add_parser("teacher").add_argument
    option("--steps", type=int, default=4000)
    option("--decay-steps", type=int, default=1500, help="linear to 0 at the end")
    option("--batch", type=int, default=64)
    option("--lr", type=float, default=1e-3)
    option("--seed", type=int, default=0)
    option("--sample-every", type=int, default=1000)
    commands.add_parser("package")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.command == "vae":
        images = read_pictures("train")[0]
        autoencoder.train(images, args.run, args.steps, args.decay_steps, batch=16, kl_weight=1e-2)
    elif args.command == "teacher":
        train_teacher(args.run, args)
    else:
        package(args.run)


if __name__ == "__main__":
    main()
