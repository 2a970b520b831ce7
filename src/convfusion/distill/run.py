"""A distillation from end to end: the data made ready, the blocks trained, and saved."""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convfusion import checkpoint
from convfusion.data.cache import build_cache, open_cache
from convfusion.data.latents import LatentDataset, TrainingData
from convfusion.data.sources import open_source
from convfusion.distill import state as saved_state
from convfusion.distill.config import DistillConfig
from convfusion.distill.environment import check_possible, ready_to_train, stop_on_interrupt
from convfusion.distill.trainer import DrawPicture, OnStep, Trainer
from convfusion.errors import ConvFusionError
from convfusion.families import check_captioned, denoiser_of
from convfusion.folders import locked
from convfusion.progress import Progress
from convfusion.surgery import convert, mixers_of, presets


@dataclass(frozen=True)
class DistillResult:
    """How a run ended.

    Attributes:
        steps: done in all, over every resumption.
        stopped: whether Ctrl-C ended it before its last step.
        seconds: of this call.
        losses: the weighted terms of the last step.
        skipped: steps that were skipped because a loss or gradient was not finite.
        epsilon_error: on the samples held out, if there are any and the run has ended.
    """

    steps: int
    stopped: bool
    seconds: float
    losses: dict[str, float]
    skipped: int = 0
    epsilon_error: float | None = None


def distill(
    pipe: Any,
    data: LatentDataset | TrainingData | str | Path,
    config: DistillConfig = DistillConfig(),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    validate: DrawPicture | None = None,
    progress: bool | None = None,
) -> DistillResult:
    """Train the blocks of a pipeline to do what its own attention did, in place.

    Under `accelerate launch` every process calls this alike and takes its share of each batch.

    Args:
        pipe: a pipeline with its attention in place or kept. One that is not converted is converted
            by the preset of its layout, or as the checkpoint that is resumed.
        data: what to train on: a cache or a data set, or the folder of a cache, or a source as
            `open_source` takes it, which is encoded into `out/cache` first.
        config: see `DistillConfig`.
        out: folder for checkpoints, logs and, at the end, the blocks themselves; nothing is
            written without it.
        resume: go on from the last checkpoint in `out`, if there is one.
        on_step: called after each step with its number (from 1) and its loss terms.
        validate: called with the pipeline and the step; returns a picture to keep.
        progress: show a bar; by default on a terminal where no other bar is shown.

    Raises:
        ConvFusionError: the attention was dropped; or the data cannot be read, or need a folder to
            be encoded into; or too many steps in a row had a loss or gradient that was not finite;
            or another process trains into the folder.
        CheckpointError: the checkpoint to resume from belongs to another config or is damaged; or
            one cannot be written.
    """
    folder = Path(out) if out is not None else None
    is_first = os.environ.get("RANK", "0") == "0"  # of a launcher's processes
    shown = progress if is_first else False
    check_captioned(pipe)
    check_possible(denoiser_of(pipe), config)
    with locked(folder) if folder is not None and is_first else nullcontext():
        if folder is not None and not resume:
            saved_state.check_unused(folder)
        last = saved_state.to_resume(folder) if folder is not None and resume else None
        if isinstance(data, str | Path):
            data = encode_data(pipe, data, folder, config, progress=shown)
        ensure_converted(pipe, last, say=shown is not False)
        trainer = Trainer(pipe, data, config, folder)
        trainer.accelerator.wait_for_everyone()  # all have looked at the folder before one writes
        return run_to_end(trainer, last, on_step, validate, progress=shown)


def run_to_end(
    trainer: Trainer,
    last: Path | None,
    on_step: OnStep | None,
    validate: DrawPicture | None,
    *,
    progress: bool | None,
) -> DistillResult:
    """Train from the last checkpoint, or the first step, and save the blocks."""
    config, started = trainer.config, time.perf_counter()
    with (
        ready_to_train(trainer.student, config),
        stop_on_interrupt() as interrupted,
        Progress(progress) as bars,
    ):
        trainer.begin(last)
        bar = bars.add("distilling", total=config.steps, done=trainer.state.step)

        def report(step: int, terms: dict[str, float]) -> None:
            bar.update(step)
            if on_step is not None:
                on_step(step, terms)

        terms = trainer.train(interrupted, report, validate)
        ended = trainer.state.step == config.steps
        error = trainer.error
        if ended and error is None:  # as where a run had come to its end before
            error = trainer.held_out_error()
    if trainer.out is not None and trainer.accelerator.is_main_process:
        checkpoint.save(trainer.pipe, trainer.out)
    trainer.accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    state = trainer.state
    return DistillResult(state.step, not ended, seconds, terms, state.skipped, error)


def encode_data(
    pipe: Any,
    data: str | Path,
    folder: Path | None,
    config: DistillConfig,
    *,
    progress: bool | None,
) -> TrainingData:
    """The cache that a path names, or one in the run's folder that a source is encoded into.

    Raises:
        ConvFusionError: there is no folder for it, several processes would each encode, or the
            source cannot be read.
    """
    if (Path(data) / "cache.json").is_file():
        return open_cache(pipe, data)
    source = open_source(str(data))
    if folder is None:
        raise ConvFusionError(
            f"{data} is encoded before training, and that needs a folder: pass `out`, or a cache "
            "that build_cache wrote"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConvFusionError(
            "several processes would each encode the data: build a cache first, and pass its folder"
        )
    with Progress(progress) as bars:
        bar = bars.add("encoding", total=source.total)
        workers = config.workers
        return build_cache(
            pipe, str(data), folder / "cache", num_workers=workers, on_progress=bar.update
        )


def ensure_converted(pipe: Any, last: Path | None, *, say: bool) -> None:
    """Convert a pipeline that is not, as the checkpoint to resume from or by its preset.

    Args:
        pipe: left alone if it is converted.
        last: the checkpoint, or None.
        say: print a line about it to standard error.
    """
    model = denoiser_of(pipe)
    if mixers_of(model):
        return
    if last is not None:
        checkpoint.load(pipe, last)
        how = f"as in {last}"
    else:
        preset = presets.choose_preset(model)
        convert(pipe, preset)
        how = f"by the preset {preset!r}"
    if say:
        print(f"The pipeline was not converted yet: it is now, {how}.", file=sys.stderr)
