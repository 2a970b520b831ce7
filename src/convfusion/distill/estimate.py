"""What a distillation would train, hold and take, found by steps that change nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from convfusion.data.latents import LatentDataset
from convfusion.distill.config import DistillConfig
from convfusion.distill.optimizers import STATE_PER_NUMBER
from convfusion.distill.run import distill
from convfusion.families import (
    denoiser_of,
    family_of,
    frame_scale,
    latent_scale,
    native_frames,
    native_size,
)
from convfusion.generate import check_size
from convfusion.mixers import Grid
from convfusion.surgery import mixers_of, status
from convfusion.surgery.record import record_of, set_record

TRIED = 3  # steps, of which the first is not timed


@dataclass(frozen=True)
class RunEstimate:
    """What a run would do.

    Attributes:
        sites: self-attentions of the model.
        converted: of them, those whose blocks would train.
        trained: parameters that would train.
        frozen: parameters of the denoiser that would not.
        held_bytes: weights of the denoiser, gradients and optimiser state of the blocks, EMA.
        peak_bytes: the most that was in use on the GPU; None on a CPU.
        seconds_per_step: of the slower kind of step, measured.
        steps: of the run.
    """

    sites: int
    converted: int
    trained: int
    frozen: int
    held_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    steps: int

    def describe(self) -> dict[str, str]:
        """The plan in words: what is measured, and how much it is."""
        total = timedelta(seconds=round(self.seconds_per_step * self.steps))
        lines = {
            "sites that would train": f"{self.converted} of {self.sites}",
            "parameters that would train": f"{self.trained / 1e6:.2f}M",
            "parameters that stay frozen": f"{self.frozen / 1e6:.2f}M",
            "weights, gradients and optimizer state": f"{self.held_bytes / 2**30:.2f} GiB",
        }
        if self.peak_bytes is not None:
            lines["peak GPU memory of a step"] = f"{self.peak_bytes / 2**30:.2f} GiB"
        lines["time of a step on this device"] = f"{self.seconds_per_step:.2f} s"
        lines[f"time of all {self.steps} steps on this device"] = str(total)
        return lines


def estimate_run(pipe: Any, config: DistillConfig, size: Grid | None = None) -> RunEstimate:
    """Try a few steps on noise, put the blocks back, and tell what they took.

    Args:
        pipe: as for `distill`.
        config: of the run.
        size: (height, width) of the training pictures, or (frames, height, width) of clips, by
            default the pipeline's own.

    Raises:
        ConvFusionError: the size cannot be drawn; and as `distill`.
    """
    student = denoiser_of(pipe)
    data = _make_noise(pipe, config, size)
    mixers = mixers_of(student)
    before = {path: {k: v.clone() for k, v in m.state_dict().items()} for path, m in mixers.items()}
    records = {path: record_of(mixer) for path, mixer in mixers.items()}
    alone = config.imitation_steps == config.steps
    tried = replace(
        config,
        steps=TRIED,
        imitation_steps=TRIED if alone else 0,
        start="converted",
        warmup=-1,
        held_out=0,
    )
    times: list[float] = []

    def note(step: int, terms: dict[str, float]) -> None:
        times.append(time.perf_counter())

    on_gpu = student.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(student.device)
    try:
        distill(pipe, data, tried, on_step=note, progress=False)
    finally:
        for path, mixer in mixers.items():
            mixer.load_state_dict(before[path])
            set_record(mixer, records[path])
    blocks = [p for mixer in mixers.values() for p in mixer.parameters()]
    trained = sum(p.numel() for p in blocks)
    kept = trained * STATE_PER_NUMBER[config.optimizer]
    every = sum(p.numel() for p in student.parameters())
    frozen_bytes = (every - trained) * student.dtype.itemsize
    return RunEstimate(
        sites=len(status(student).sites),
        converted=len(mixers),
        trained=trained,
        frozen=every - trained,
        held_bytes=frozen_bytes + int(4 * (trained * (2 + bool(config.ema)) + kept)),
        peak_bytes=torch.cuda.max_memory_allocated(student.device) if on_gpu else None,
        seconds_per_step=(times[-1] - times[0]) / (TRIED - 1),
        steps=config.steps,
    )


def _make_noise(pipe: Any, config: DistillConfig, size: Grid | None) -> LatentDataset:
    """A batch of noise in place of latents, for pictures or clips that can be drawn."""
    scale = latent_scale(pipe)
    *frames, height, width = size or native_size(pipe)
    check_size(pipe, (height, width))
    if own := native_frames(pipe):
        frames = [((frames or [own])[0] - 1) // frame_scale(pipe) + 1]
    denoiser = denoiser_of(pipe)
    channels: Any = family_of(denoiser).latent_channels(denoiser)
    shape = (config.batch_size, channels, *frames, height // scale, width // scale)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
    return LatentDataset(noise, [""] * config.batch_size)
