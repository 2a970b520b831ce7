"""The training loop: only the blocks move, everything else stays frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from convfusion import checkpoint
from convfusion.data.latents import LatentDataset, TrainingData, hold_out, prepare_data
from convfusion.data.workers import ignore_interrupts
from convfusion.distill import state as saved_state
from convfusion.distill.batches import BatchPart, StepBatches
from convfusion.distill.config import DistillConfig
from convfusion.distill.environment import (
    decoded_as_it_is,
    make_accelerator,
)
from convfusion.distill.logs import HELD_OUT, Owed, RunLog, owed
from convfusion.distill.optimizers import make_optimizer
from convfusion.distill.startup import blocks_to_start, draw_noised_batches
from convfusion.distill.task import DistillTask, Losses
from convfusion.distill.validation import held_out_error, what_fails
from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of
from convfusion.families.conditioning import place_conditioning
from convfusion.surgery import mixers_of, start_from_attention
from convfusion.surgery.record import count_steps

OnStep = Callable[[int, dict[str, float]], None]
DrawPicture = Callable[[Any, int], Any]
SCALER_HALVINGS = 24  # a loss scaler starts at 2^16 and skips steps until its scale fits


class Trainer:
    """One run: its state, and the objects around it."""

    def __init__(
        self, pipe: Any, data: LatentDataset | TrainingData, config: DistillConfig, out: Path | None
    ) -> None:
        self.pipe, self.config, self.out = pipe, config, out
        self.student = denoiser_of(pipe)
        self.accelerator = make_accelerator(config, out, cpu=self.student.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            pipe.to(self.accelerator.device)
        self.task = DistillTask(self.student, pipe.scheduler, config.losses)
        self.mixers = mixers_of(self.student)
        self.named = {
            f"{path}.{name}": parameter
            for path, mixer in self.mixers.items()
            for name, parameter in mixer.named_parameters()
        }
        if not self.named:
            raise ConvFusionError("the mixers of this model have no parameters: nothing to train")
        ready = prepare_data(pipe, data)
        self.data, self.held_out = hold_out(ready, config.held_out, config.seed)
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        count = len(self.task.schedule)
        self.batches = StepBatches(self.data, config, count, process)
        self.rests_on = saved_state.rests_on(pipe, data) if out is not None else {}
        self.state = saved_state.RunState()
        self.skipped_in_a_row = 0
        self.error: float | None = None  # of the blocks at the end, on the samples held out

    def begin(self, last: Path | None) -> None:
        """Make ready for the first step, or for the next one after a checkpoint."""
        config = self.config
        if last is not None:
            self.state = saved_state.read_run(last, self.named, config.to_dict(), self.rests_on)
            checkpoint.load(self.student, last)
        elif config.start == "attention":
            calls = draw_noised_batches(self.pipe, self.data)
            start_from_attention(self.pipe, calls, only=blocks_to_start(self.student))
        optimizer = make_optimizer(self.named.values(), config)
        saved_state.restore_optimizer(optimizer, self.named, self.state.optimizer)
        self.average = self.make_average()
        self.state.optimizer, self.state.average = {}, {}  # where they belong now
        self.clear_gradients()
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        if self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        self.owed = Owed(False, False)
        if last is not None and self.out is not None and self.is_due(self.state.step):
            self.owed = owed(
                self.out, self.state.step, held_out=any(map(len, self.held_out.groups))
            )
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        self.log = RunLog(self.accelerator, self.out, self.state.step, config.to_dict())

    def is_due(self, step: int) -> bool:
        """Whether a step is followed by a validation."""
        every = self.config.validate_every
        return step == self.config.steps or bool(every and step % every == 0)

    def make_average(self) -> EMAModel | None:
        if not self.config.ema:
            return None
        average = EMAModel(self.named.values(), decay=self.config.ema, foreach=True)
        if kept := self.state.average:
            average.optimization_step = int(kept["updates"])
            average.shadow_params = [
                kept[name].to(parameter.device) for name, parameter in self.named.items()
            ]
        return average

    def train(
        self, interrupted: list[bool], on_step: OnStep | None, validate: DrawPicture | None
    ) -> dict[str, float]:
        """Run to the last step, or to the first Ctrl-C; returns the last step's loss terms."""
        config, state = self.config, self.state
        terms: dict[str, float] = {}
        try:
            self.catch_up(validate)
            for parts in self.load_steps():
                terms = self.take_step(parts)
                state.step += 1
                if on_step is not None:
                    on_step(state.step, terms)
                ended = state.step == config.steps
                last = self.any_process_asked(bool(interrupted)) or ended
                if last or state.step % config.save_every == 0:
                    self.save()
                if self.is_due(state.step):
                    error = self.validate(validate)
                    self.error = error if ended else None
                if last:
                    break
            if self.average is not None:
                self.average.copy_to(self.named.values())
        finally:
            self.clear_gradients()
            self.log.close()
        return terms

    def load_steps(self) -> Iterator[list[BatchPart]]:
        """The parts of the batch of every step that is left."""
        # A generator of its own: the loader would draw a seed from the global one.
        yield from DataLoader(
            self.batches,
            sampler=range(self.state.step, self.config.steps),
            batch_size=None,
            num_workers=self.config.workers,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),
        )

    def take_step(self, parts: list[BatchPart]) -> dict[str, float]:
        """One optimiser step, unless something is not finite.

        Args:
            parts: of this process's share of the batch.

        Returns:
            The loss terms, over all processes.
        """
        config, accelerator = self.config, self.accelerator
        rate = config.learning_rate * config.rate(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        alone = self.state.step < config.imitation_steps
        measured = []
        for part in parts:
            with accelerator.accumulate(self.model):
                losses = self.model(*self.place_part(part), alone=alone)
                accelerator.backward(torch.stack(list(losses.terms.values())).sum())
                measured.append(losses)
        accelerator.unscale_gradients()
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = get_total_norm(gradients)
        terms, sites = self.mean_losses(measured)
        finite = all(map(math.isfinite, (norm.item(), *terms.values())))
        if finite:
            clip_grads_with_norm_(self.named.values(), config.clip_norm, norm)
        else:
            self.skip(parts)
            self.clear_gradients()  # their norm may overflow where a scaler sees none that does
        if finite or accelerator.scaler is not None:  # a scaler skips the step by itself
            self.optimizer.step()
        if finite:
            self.skipped_in_a_row = 0
            count_steps(self.mixers.values())
            if self.average is not None:
                self.average.step(self.named.values())
        self.clear_gradients()
        done = self.state.step + 1
        if done % config.log_every == 0 or done in (1, config.steps):
            values = {f"loss/{name}": value for name, value in terms.items()}
            values |= {f"site/{path}": value for path, value in sites.items()}
            values |= {"gradient_norm": norm.item(), "learning_rate": rate}
            self.log.write(done, values | {"skipped": self.state.skipped})
        return terms

    def clear_gradients(self) -> None:
        """Clear them also amid a batch, where an optimiser under accelerate keeps them."""
        for parameter in self.named.values():
            parameter.grad = None

    def mean_losses(self, parts: list[Losses]) -> tuple[dict[str, float], dict[str, float]]:
        """Terms and site errors over the parts of all processes."""
        rows = [torch.stack([*part.terms.values(), *part.sites.values()]) for part in parts]
        mean = torch.stack(rows).detach().float().mean(dim=0)
        values = self.accelerator.reduce(mean, reduction="mean").tolist()
        terms, sites = parts[0]
        count = len(terms)
        return (
            dict(zip(terms, values[:count], strict=True)),
            dict(zip(sites, values[count:], strict=True)),
        )

    def any_process_asked(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return asked
        wish = torch.tensor([float(asked)], device=self.student.device)
        return bool(self.accelerator.reduce(wish, reduction="sum").item())

    def skip(self, parts: list[BatchPart]) -> None:
        """Count a step that is skipped.

        Raises:
            ConvFusionError: so many in a row were that training cannot go on.
        """
        self.state.skipped += 1
        self.skipped_in_a_row += 1
        most = self.config.max_skipped
        most += SCALER_HALVINGS if self.accelerator.scaler is not None else 0
        if self.skipped_in_a_row < most:
            return
        with self.accelerator.autocast():
            alone = self.state.step < self.config.imitation_steps
            placed_parts = [self.place_part(part) for part in parts]
            where = what_fails(self.task, placed_parts, alone=alone)
        raise self.not_finite(
            f"a loss or gradient was not finite in {most} steps in a row, up to step "
            f"{self.state.step + 1}; the first thing that is not finite is "
            + (where or "not with this process")
        )

    def not_finite(self, what: str) -> ConvFusionError:
        """The error for a run that cannot go on, with what is left of it."""
        last = saved_state.last_checkpoint(self.out) if self.out is not None else None
        left = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        return ConvFusionError(f"{what}. Try a lower learning rate or another autocast; {left}")

    def place_part(self, part: BatchPart) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """A part of a batch on the student's device, as the denoiser takes it."""
        device = self.student.device
        latents, noise, timesteps = (tensor.to(device) for tensor in part[:3])
        return latents, noise, timesteps, place_conditioning(part.conditioning, self.student)

    def catch_up(self, draw: DrawPicture | None) -> None:
        """Do what a kill left undone of the validation after the last checkpoint."""
        picture = self.owed.picture and draw is not None
        if picture or self.owed.error:
            error = self.validate(draw if picture else None, log=self.owed.error)
            self.error = error if self.state.step == self.config.steps else None

    def validate(self, draw: DrawPicture | None, *, log: bool = True) -> float | None:
        """Draw a picture, and measure, log and return the ε-error held out, with the average."""
        with self.averaged():
            if draw is not None and self.accelerator.is_main_process:
                # The base may be in half precision, and the blocks are not.
                with self.accelerator.autocast(), decoded_as_it_is(self.pipe.vae):
                    picture = draw(self.pipe, self.state.step)
                self.log.picture(self.state.step, picture)
            error = self.held_out_error()
        if error is not None and log and math.isfinite(error):
            self.log.write(self.state.step, {HELD_OUT: error})
        self.accelerator.wait_for_everyone()
        return error

    def held_out_error(self) -> float | None:
        """ε-error on the samples held out, or None if there are none."""
        with self.accelerator.autocast():
            size, seed = self.config.batch_size, self.config.seed
            return held_out_error(self.task, self.held_out, batch_size=size, seed=seed)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The blocks at their moving average, for a while."""
        if self.average is None:
            yield
            return
        self.average.store(self.named.values())
        self.average.copy_to(self.named.values())
        try:
            yield
        finally:
            self.average.restore(self.named.values())

    def save(self) -> None:
        """Write a checkpoint of this step, unless the blocks are spoilt.

        Raises:
            ConvFusionError: a block is not finite, so no later step can be.
            CheckpointError: it cannot be written.
        """
        state = replace(self.state)
        for name, parameter in self.named.items():
            if not parameter.isfinite().all():
                raise self.not_finite(f"after step {state.step} {name} is not finite")
        if self.out is not None and self.accelerator.is_main_process:
            state.optimizer = saved_state.optimizer_tensors(self.optimizer, self.named)
            if self.average is not None:
                shadows = zip(self.named, self.average.shadow_params, strict=True)
                state.average = dict(shadows)
                state.average["updates"] = torch.tensor(self.average.optimization_step)
            if self.accelerator.scaler is not None:
                state.scaler = self.accelerator.scaler.state_dict()
            config = self.config.to_dict()
            saved_state.write_run(self.out, self.student, state, config, self.rests_on)
        self.accelerator.wait_for_everyone()
