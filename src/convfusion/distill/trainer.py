"""The training loop: only the blocks move, everything else stays frozen."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from torch import Tensor
from torch.utils.data import DataLoader

from convfusion import checkpoint
from convfusion.adapters import Denoiser, denoiser_of
from convfusion.conditioning import encode_conditioning, latent_scale
from convfusion.distill.data import LatentDataset, StepSampler
from convfusion.distill.state import MOMENTS, SavedRun, check_unused, read_run, write_run
from convfusion.distill.task import DistillTask, LossWeights
from convfusion.errors import ConvFusionError
from convfusion.surgery import mixers_of


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides what a distillation does to the blocks.

    Attributes:
        steps: optimiser steps in all.
        imitation_steps: the first of them, in which each block learns alone to imitate its
            attention on the teacher's own inputs; the others train all blocks end to end.
        batch_size: samples per step, over all processes and accumulated parts.
        accumulation: parts that a batch is worked through in.
        learning_rate: of AdamW, after `warmup` steps.
        warmup: steps over which the rate rises from 0.
        decay: share of the steps, at the end, over which the rate falls to 0 along a cosine.
        caption_drop: share of captions replaced by '', for classifier-free guidance.
        precision: `no`, `bf16` or `fp16` autocast. The blocks train in float32.
        checkpointing: recompute activations in the backward pass.
        save_every: steps between checkpoints, of which the last two are kept.
        validate_every: steps between validation pictures; 0 draws none.
        seed: of batches, noise, timesteps and dropped captions; a step's draws depend on it and
            the step alone.
    """

    steps: int = 1000
    imitation_steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 3e-4
    warmup: int = 100
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    caption_drop: float = 0.15
    precision: str = "no"
    checkpointing: bool = False
    losses: LossWeights = field(default_factory=LossWeights)
    save_every: int = 500
    validate_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise ConvFusionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.imitation_steps <= self.steps:
            raise ConvFusionError("imitation_steps must lie between 0 and steps")
        if self.batch_size % self.accumulation:
            raise ConvFusionError(
                f"batch_size {self.batch_size} is not a multiple of accumulation "
                f"{self.accumulation}"
            )
        if self.precision not in ("no", "bf16", "fp16"):
            raise ConvFusionError(f"precision must be no, bf16 or fp16, not {self.precision!r}")
        if self.learning_rate <= 0 or self.warmup < 0 or self.weight_decay < 0:
            raise ConvFusionError(
                "learning_rate must be positive, warmup and weight_decay not negative"
            )
        if not 0 <= self.caption_drop <= 1 or not 0 <= self.decay <= 1:
            raise ConvFusionError("caption_drop and decay must lie between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        tail, left = self.decay * self.steps, self.steps - step
        falling = 0.5 - 0.5 * math.cos(math.pi * left / tail) if left < tail else 1.0
        return rising * falling


@dataclass(frozen=True)
class DistillResult:
    """How a run ended.

    Attributes:
        steps: done in all, over every resumption.
        stopped: whether Ctrl-C ended it before its last step.
        seconds: of this call.
        losses: the weighted terms of the last step.
    """

    steps: int
    stopped: bool
    seconds: float
    losses: dict[str, float]


def distill(
    pipe: Any,
    data: LatentDataset,
    config: DistillConfig = DistillConfig(),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    validate: Callable[[Any, int], Any] | None = None,
) -> DistillResult:
    """Train the blocks of a converted pipeline, in place.

    Args:
        pipe: a pipeline whose denoiser is converted, with its attention kept.
        data: what to train on.
        config: see `DistillConfig`.
        out: folder for checkpoints, TensorBoard logs and, at the end, the blocks themselves;
            nothing is written without it.
        resume: go on from the last checkpoint in `out`, if there is one.
        on_step: called after each step with its number (from 1) and its loss terms.
        validate: called with the pipeline and the step; returns a picture to keep.

    Raises:
        ConvFusionError: the model is not converted, or its attention was dropped.
        CheckpointError: the checkpoint to resume from belongs to another config or is damaged.
    """
    folder = Path(out) if out is not None else None
    if folder is not None and not resume:
        check_unused(folder)
    run = _Run(pipe, data, config, folder)
    saved = read_run(folder, run.named, asdict(config)) if folder is not None and resume else None
    started = time.perf_counter()
    with _ready_to_train(run.student, config), _stop_on_interrupt() as interrupted:
        if saved is not None:
            run.restore(saved)
        terms = run.train(interrupted, on_step, validate)
    if folder is not None:
        checkpoint.save(pipe, folder)
    return DistillResult(run.step, run.step < config.steps, time.perf_counter() - started, terms)


class _Run:
    """The state of one run: what a checkpoint holds, and the objects around it."""

    def __init__(
        self, pipe: Any, data: LatentDataset, config: DistillConfig, out: Path | None
    ) -> None:
        self.pipe, self.data, self.config, self.out = pipe, data, config, out
        self.student = denoiser_of(pipe)
        self.task = DistillTask(self.student, pipe.scheduler, config.losses)
        self.mixers = mixers_of(self.student)
        check_precision(self.student, config.precision)
        self.accelerator = make_accelerator(config, out, cpu=self.student.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            raise ConvFusionError("distillation runs in one process for now: launch it with python")
        scale = latent_scale(pipe)
        height, width = data.latents.shape[-2:]
        self.size = (height * scale, width * scale)
        self.named = {
            f"{path}.{name}": parameter
            for path, mixer in self.mixers.items()
            for name, parameter in mixer.named_parameters()
        }
        if not self.named:
            raise ConvFusionError("the mixers of this model have no parameters: nothing to train")
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.step = 0

    def train(
        self,
        interrupted: list[bool],
        on_step: Callable[[int, dict[str, float]], None] | None,
        validate: Callable[[Any, int], Any] | None,
    ) -> dict[str, float]:
        """Run to the last step, or to the first Ctrl-C; returns the last step's loss terms."""
        if self.out is not None:
            self.accelerator.init_trackers("tensorboard")
        self.optimizer = self.accelerator.prepare(self.optimizer)
        terms: dict[str, float] = {}
        try:
            for batch in self.batches():
                self.set_rate()
                terms = self.take_step(batch)
                self.step += 1
                self.accelerator.log({f"loss/{k}": v for k, v in terms.items()}, step=self.step)
                if on_step is not None:
                    on_step(self.step, terms)
                last = self.step == self.config.steps or bool(interrupted)
                if last or self.step % self.config.save_every == 0:
                    self.save()
                if validate and self.config.validate_every:
                    self.validate(validate)
                if last:
                    break
        finally:
            self.optimizer.zero_grad()
            self.accelerator.end_training()
        return terms

    def validate(self, draw: Callable[[Any, int], Any]) -> None:
        """Draw and keep a picture, if it is time for one."""
        if self.step % self.config.validate_every == 0:
            with self.accelerator.autocast():  # the blocks are in float32, whatever the base is
                picture = draw(self.pipe, self.step)
            self.keep_picture(picture)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The batches from this step on."""
        config = self.config
        sampler = StepSampler(
            len(self.data), config.batch_size, config.seed, self.step, config.steps
        )
        # A generator of its own: the loader would draw a seed from the global one.
        generator = torch.Generator()
        yield from DataLoader(self.data, batch_sampler=sampler, generator=generator)

    def take_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step on one batch, in `accumulation` parts."""
        config, accelerator = self.config, self.accelerator
        latents, noise, timesteps, captions = self.draw(batch)
        size = config.batch_size // config.accumulation
        alone = self.step < config.imitation_steps
        measure = self.task.imitation if alone else self.task.losses
        totals: dict[str, float] = {}
        for start in range(0, config.batch_size, size):
            part = slice(start, start + size)
            conditioning = encode_conditioning(self.pipe, captions[part], self.size)
            with accelerator.accumulate(self.student), accelerator.autocast():
                terms = measure(latents[part], noise[part], timesteps[part], conditioning)
                accelerator.backward(torch.stack(list(terms.values())).sum())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.named.values(), config.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + term.item() / config.accumulation
        if config.precision != "fp16" and not all(map(math.isfinite, totals.values())):
            raise ConvFusionError(
                f"the loss is not finite at step {self.step + 1} ({totals}): "
                "try a lower learning rate or another precision; earlier checkpoints are intact"
            )
        return totals

    def draw(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Latents, noise, timesteps and captions of a step; all draws come from seed and step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        latents = batch["latents"].float()
        noise = torch.randn(latents.shape, generator=generator)
        count = len(self.task.alphas_cumprod)
        timesteps = torch.randint(0, count, (len(latents),), generator=generator)
        chance = torch.rand(len(latents), generator=generator)
        captions = [
            "" if drop < self.config.caption_drop else caption
            for drop, caption in zip(chance.tolist(), batch["caption"], strict=True)
        ]
        device = self.student.device
        return latents.to(device), noise.to(device), timesteps.to(device), captions

    def set_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate(self.step)

    def save(self) -> None:
        if self.out is not None:
            state = self.optimizer.state
            write_run(self.out, self.student, self.named, state, self.step, asdict(self.config))

    def restore(self, saved: SavedRun) -> None:
        """Take over what a checkpoint of this run holds."""
        checkpoint.load(self.student, saved.folder)
        for name, parameter in self.named.items():
            for moment in MOMENTS:
                value = saved.moments[f"{name}/{moment}"]
                device = "cpu" if moment == "step" else parameter.device
                self.optimizer.state[parameter][moment] = value.to(device)
        self.step = saved.step

    def keep_picture(self, picture: Any) -> None:
        """Write a validation picture, and show it in TensorBoard."""
        if self.out is None:
            return
        folder = self.out / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step-{self.step:07d}.png")
        pixels = np.asarray(picture.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            tracker.log_images({"validation": pixels}, step=self.step, dataformats="NHWC")


def check_precision(model: Denoiser, precision: str) -> None:
    """Raise a ConvFusionError unless blocks in float32 can train inside this model."""
    fitting = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
    if fitting not in ("no", precision):
        raise ConvFusionError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}: distil it with "
            f"precision {fitting!r}, or load it in float32"
        )
    if precision == "fp16" and model.device.type == "cpu":
        raise ConvFusionError("fp16 trains on a GPU only: on a CPU take precision bf16 or no")


def make_accelerator(config: DistillConfig, out: Path | None, *, cpu: bool) -> Accelerator:
    """The accelerator of a run, logging to TensorBoard where that is installed."""
    logged = out is not None and is_tensorboard_available()
    try:
        return Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation,
            log_with="tensorboard" if logged else None,
            project_dir=str(out) if out is not None else None,
            cpu=cpu,
        )
    except ValueError as error:  # its settings are fixed for the life of a process
        raise ConvFusionError(
            f"a distillation with another precision or device ran in this process before: {error}"
        ) from None


@contextmanager
def _ready_to_train(model: Denoiser, config: DistillConfig) -> Iterator[None]:
    """Let gradients reach the blocks alone, in float32, and put every switch back afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    dtype, checkpointed = model.dtype, model.is_gradient_checkpointing
    model.requires_grad_(False)
    model.eval()  # a DiT in training mode drops labels, and the teacher would drop others
    for mixer in mixers_of(model).values():
        mixer.float().requires_grad_(True)
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if config.checkpointing and not checkpointed:
            model.disable_gradient_checkpointing()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
        for mixer in mixers_of(model).values():
            mixer.to(dtype)


@contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a wish to stop after the step; a second one interrupts."""
    wish: list[bool] = []

    def ask(previous: Any, number: int, frame: Any) -> None:
        wish.append(True)
        signal.signal(number, previous)

    try:
        previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, partial(ask, previous))
    except ValueError:  # only the main thread may listen for signals
        yield wish
        return
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, previous)
