"""Step 3: the autoencoder of the mini model, 64×64×3 ↔ 16×16×4.

`python vae.py --run run` trains a small `AutoencoderKL` on the training pictures
(L1 + gradient L1 + 1e-2·KL) and writes `run/vae` in diffusers' layout.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import load_pictures, load_state, save_state
from diffusers import AutoencoderKL


def make_vae() -> AutoencoderKL:
    """About 1.4M parameters, no attention, 4× smaller per side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def loss_of(vae: AutoencoderKL, x: torch.Tensor, kl_weight: float) -> torch.Tensor:
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True))
    return F.l1_loss(y, x) + edges + kl_weight * posterior.kl().mean() / x[0].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--decay-steps", type=int, default=600, help="linear to 0 at the end")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--kl-weight", type=float, default=1e-2)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images = load_pictures(args.run, "train").images.to(device)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    state = {"model": vae, "optimizer": optimizer}
    step = load_state(args.run / "vae.pt", state)
    start = time.time()
    while step < args.steps:
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(images), (args.batch,), generator=generator).to(device)
        x = images[picks].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = loss_of(vae, x, args.kl_weight)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100, (args.steps - step) / args.decay_steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"{step} loss {loss.item():.4f} {(time.time() - start):.0f}s", flush=True)
            save_state(args.run / "vae.pt", state, step)
    finish(vae, images, args.run / "vae")


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


if __name__ == "__main__":
    main()
