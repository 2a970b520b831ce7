"""Step 3: a small autoencoder; of the mini model, 64×64×3 ↔ 16×16×4.

`python vae.py --run run` trains an `AutoencoderKL` on the training pictures
(L1 + gradient L1 + 1e-2·KL) and writes `run/vae` in diffusers' layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Schedule, fit, load_pictures
from diffusers import AutoencoderKL


def make_vae(side: int) -> AutoencoderKL:
    """About 1.4M parameters, no attention, 4× smaller per side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=side,
        mid_block_add_attention=False,
    )


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def loss_of(vae: AutoencoderKL, x: torch.Tensor, kl_weight: float) -> torch.Tensor:
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True))
    return F.l1_loss(y, x) + edges + kl_weight * posterior.kl().mean() / x[0].numel()


def train(
    images: torch.Tensor, run: Path, steps: int, decay_steps: int, batch: int, kl_weight: float
) -> None:
    """Train an autoencoder on uint8 pictures [P, 3, H, W] and write `run/vae`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images = images.to(device)
    vae = make_vae(images.shape[-1]).to(device, memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(images), (batch,), generator=generator).to(device)
        x = images[picks].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        return loss_of(vae, x, kl_weight)

    schedule = Schedule(steps, decay_steps, lr=2e-3, warmup=100)
    fit(vae, loss, schedule, run / "vae.pt")
    finish(vae, images, run / "vae")


@torch.no_grad()
def finish(vae: AutoencoderKL, images: torch.Tensor, folder: Path) -> None:
    """Set the scaling factor to 1/std of the latents and write the folder."""
    vae.eval()
    x = images[:: max(1, len(images) // 1024)].float().div(127.5).sub(1)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    y = torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
    psnr = -10 * ((y - x) / 2).square().mean(dim=(1, 2, 3)).log10()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(
        f"scaling {vae.config.scaling_factor}, PSNR {psnr.mean():.2f} dB",
        latents.std((0, 2, 3)).tolist(),
    )
    vae.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--decay-steps", type=int, default=600, help="linear to 0 at the end")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--kl-weight", type=float, default=1e-2)
    args = parser.parse_args()
    images = load_pictures(args.run, "train").images
    train(images, args.run, args.steps, args.decay_steps, args.batch, args.kl_weight)


if __name__ == "__main__":
    main()
