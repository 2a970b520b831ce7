"""How good the video teacher is: what its clips show, against what their captions say.

Clips are drawn by one emoji over a plain ground, so that colour and motion can be read off them:
the ground from the edge of the picture, the motion from where everything else is. How well the
emoji itself is drawn is not measured.
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline
from video import GROUNDS, Side, batched, clip, draw, encode, generate

NOISES = 5  # that the error of the velocity is measured at
FEWEST = 8  # pixels that an emoji has at least
LEAST = {"way": 6.0, "hop": 8.0, "growth": 1.8}  # pixels, pixels, ratio of the areas


def ground_of(frames: torch.Tensor) -> str:
    """The ground of `GROUNDS` that is nearest to the edge of frames [3, T, H, W] in [-1, 1]."""
    colours = torch.tensor(list(GROUNDS.values())) / 127.5 - 1
    nearest = (colours - _edge(frames)).square().sum(dim=1).argmin()
    return list(GROUNDS)[int(nearest)]


def motion_of(frames: torch.Tensor) -> str | None:
    """The motion of `MOTIONS` that frames [3, 17, H, W] in [-1, 1] show.

    What neither goes anywhere nor changes its size counts as spinning. None where some frame shows
    nothing but ground.
    """
    there = (frames - _edge(frames).view(3, 1, 1, 1)).abs().amax(dim=0) > 0.2
    area = there.sum(dim=(1, 2))
    if area.min() < FEWEST:
        return None
    axis = torch.arange(frames.shape[-1], dtype=torch.float32)
    x, y = ((there.sum(dim=other) * axis).sum(dim=1) / area for other in (1, 2))
    hop = (y[[0, 8, 16]].mean() - y[[4, 12]].mean()) / LEAST["hop"]
    right, down = ((each[-1] - each[0]) / LEAST["way"] for each in (x, y))
    growth = (area[-1] / area[0]).log() / torch.tensor(LEAST["growth"]).log()
    found = {
        "moves left": -right,
        "moves right": right,
        "moves up": -down,
        "moves down": down,
        "grows": growth,
        "shrinks": -growth,
        "bounces": hop,
    }
    most = max(found, key=lambda motion: float(found[motion]))
    return most if found[most] > 1 else "spins"


def _edge(frames: torch.Tensor) -> torch.Tensor:
    """The middle colour of the outermost pixels, [3]."""
    sides = (frames[..., 0, :], frames[..., -1, :], frames[..., 0], frames[..., -1])
    return torch.cat([side.flatten(1) for side in sides], dim=1).median(dim=1).values


def measure(pipe: WanPipeline, count: int) -> dict[str, dict[str, float]]:
    """Numbers on the first clips of the training list and of the held-out list `results`.

    Returns:
        By list: `psnr` of the autoencoder in dB; `velocity`, the denoiser's ‖v̂ - v‖²/‖v‖²; and the
        shares of drawn clips with the `motion` and with the `ground` that their captions name.
    """
    return {side: _measure_side(pipe, side, count) for side in ("train", "results")}


@torch.no_grad()
def _measure_side(pipe: WanPipeline, side: Side, count: int) -> dict[str, float]:
    psnr, velocity, motion, ground = [], [], [], []
    for few in batched([clip(side, number) for number in range(count)], 8):
        real, captions = torch.stack([draw(one) for one in few]), [one.caption for one in few]
        back = pipe.vae(real).sample
        psnr += (-10 * ((back - real) / 2).square().mean(dim=(1, 2, 3, 4)).log10()).tolist()
        velocity.append(_velocity_error(pipe, encode(pipe.vae, real), captions))
        for one, drawn in zip(few, generate(pipe, captions), strict=True):
            motion.append(motion_of(2 * drawn - 1) == one.motion)
            ground.append(ground_of(2 * drawn - 1) == one.ground)
    return {
        "psnr": round(sum(psnr) / count, 2),
        "velocity": round(sum(velocity) / len(velocity), 4),
        "motion": round(sum(motion) / count, 3),
        "ground": round(sum(ground) / count, 3),
    }


def _velocity_error(pipe: WanPipeline, latents: torch.Tensor, captions: list[str]) -> float:
    """‖v̂ - v‖²/‖v‖² at the timesteps of a short drawing, by noise that is always the same."""
    text, _ = pipe.encode_prompt(captions, None, False, max_sequence_length=512)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(NOISES)
    error = 0.0
    for share, t in zip(pipe.scheduler.sigmas, pipe.scheduler.timesteps, strict=False):
        noisy = (1 - share) * latents + share * noise
        found = pipe.transformer(noisy, t.expand(len(latents)), text, return_dict=False)[0]
        error += float((found - (noise - latents)).square().mean())
    return error / NOISES / float((noise - latents).square().mean())
