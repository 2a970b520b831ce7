"""The video teacher's autoencoder: clips 64×64×17×3 ↔ 16×16×5×8.

`video_teacher.py train` trains this `AutoencoderKLWan` first: with the squared error, 0.2 times L1
of the differences along each axis, and 1e-3·KL. Wan's layout keeps what its convolutions saw of the
frames before; the gradients run through that as well, so it needs no training code of its own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Schedule, fit, read_ahead
from diffusers import AutoencoderKLWan
from video import FRAMES, SIZE, batched, clip, draw

CHANNELS = 8  # of the latents
EDGES_WEIGHT, KL_WEIGHT = 0.2, 1e-3
CROP, CROP_FRAMES, CROPS = 24, 9, 8
MEASURED = range(0, 240, 4)  # training clips that the latents are measured on


def make_vae() -> AutoencoderKLWan:
    """1.5M parameters; 4× smaller per side and in time, with the shortcuts of Wan 2.2.

    Wan's own is 8× or 16× smaller per side.
    """
    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    start_layers(vae)
    return vae


def start_layers(vae: AutoencoderKLWan) -> None:
    """Start with weights that let a clip through, residual branches that add nothing, little noise.

    From torch's own start it trains more slowly: an input is lost among the biases of the layers
    that normalise.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            torch.nn.init.zeros_(layer.bias)
            if name.endswith((".conv2", ".proj")):  # the last of a residual branch
                torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():  # of the logarithm of the variance
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = -5


def autoencoder_batch(step: int, clips: int = 0) -> torch.Tensor:
    """What the autoencoder sees in a step.

    Args:
        step: which.
        clips: whole ones, which suits a GPU; with 0 it is one whole clip in each fourth step and
            eight small pieces in the others, which suits a CPU.

    Returns:
        [clips, 3, 17, 64, 64]; with 0 [1, 3, 17, 64, 64] or [8, 3, 9, 24, 24].
    """
    generator = torch.Generator().manual_seed(step)
    numbers = torch.randint(2**31, (clips or CROPS,), generator=generator).tolist()
    if clips or step % 4 == 0:
        return torch.stack([draw(clip("train", number)) for number in numbers[: clips or 1]])
    corners = torch.randint(SIZE - CROP + 1, (CROPS, 2), generator=generator).tolist()
    starts = torch.randint(FRAMES - CROP_FRAMES + 1, (CROPS,), generator=generator).tolist()
    pieces = []
    for number, (y, x), t in zip(numbers, corners, starts, strict=True):
        frames = draw(clip("train", number))
        pieces.append(frames[:, t : t + CROP_FRAMES, y : y + CROP, x : x + CROP])
    return torch.stack(pieces)


def autoencoder_loss(vae: AutoencoderKLWan, x: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    edges = sum(F.l1_loss(y.diff(dim=axis), x.diff(dim=axis)) for axis in (2, 3, 4))
    mean, log_var = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()
    return F.mse_loss(y, x) + EDGES_WEIGHT * edges + KL_WEIGHT * kl / x.numel()


def train_vae(run: Path, steps: int, decay_steps: int, clips: int, device: str) -> None:
    """Train the autoencoder, measure its latents and write `run/vae`."""
    torch.manual_seed(0)
    vae = make_vae().to(device)
    batches = read_ahead(partial(autoencoder_batch, clips=clips), steps)

    def loss(step: int) -> torch.Tensor:
        return autoencoder_loss(vae, batches(step).to(device))

    fit(vae, loss, Schedule(steps, decay_steps, lr=1.5e-3, warmup=50), run / "vae.pt")
    vae.eval()
    measure_latents(vae, device)
    vae.save_pretrained(run / "vae")


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, device: str) -> None:
    """Note the mean and the deviation of each channel, and print how well clips come back."""
    found, errors = [], []
    for few in batched([clip("train", number) for number in MEASURED], 4):
        x = torch.stack([draw(one) for one in few]).to(device)
        found.append(vae.encode(x).latent_dist.mean)
        errors.append(((vae.decode(found[-1]).sample - x) / 2).square().mean(dim=(1, 2, 3, 4)))
    all_latents = torch.cat(found)
    vae.register_to_config(
        latents_mean=[round(each, 4) for each in all_latents.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(each, 4) for each in all_latents.std((0, 2, 3, 4)).tolist()],
    )
    psnr = -10 * torch.cat(errors).log10().mean()
    print(f"autoencoder: PSNR {psnr:.2f} dB, deviations {vae.config.latents_std}", flush=True)
