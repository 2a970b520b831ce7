"""`convfusion distill`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.cache import encode, guided_as_it_can
from convfusion.cli.console import console, describe, progress_bar
from convfusion.cli.fields import with_fields
from convfusion.cli.models import (
    check_loading,
    check_revision,
    equip,
    guidance_for,
    is_embedded,
    load_pipeline,
)
from convfusion.cli.options import (
    Config,
    Data,
    Device,
    Every,
    Out,
    Precision,
    Revision,
    SettingsFile,
    Size,
    check_folder,
    check_new,
    parse_size,
)
from convfusion.distill.config import DistillConfig
from convfusion.errors import ConvFusionError


@with_fields(DistillConfig)
def distill(
    given: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(
            help="A pipeline: folder, Hub name or .safetensors file; or `mini`, `mini-teacher`."
        ),
    ] = None,
    out: Out = None,
    settings: SettingsFile = None,
    data: Data = None,
    size: Size = None,
    buckets: Annotated[
        bool | None, typer.Option("--buckets/--no-buckets", help="Keep the ratio of sides, about.")
    ] = None,
    config: Config = None,
    every: Every = None,
    first: Annotated[
        int | None, typer.Option(min=0, help="With --every: the first of them, from 0.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="convfusion or paper: what training options that are not given are."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Of the validation pictures; by default the first four captions."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would train, memory and time, and stop.")
    ] = False,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Train the blocks of a pipeline against its own attention.

    Ctrl-C stops after the step at hand and saves; go on with --resume.
    """
    from convfusion.distill.environment import check_libraries, check_possible
    from convfusion.distill.settings import as_toml, read_settings
    from convfusion.families import check_captioned, denoiser_of
    from convfusion.surgery import mixers_of

    named: dict[str, Any] = {"model": model, "data": data, "size": size, "buckets": buckets}
    named |= {"revision": revision, "config": config, "every": every, "first": first}
    named["recipe"] = recipe
    run = read_settings(settings, {**named, "distill": given})
    check_run(run, None if dry_run else out, dry_run=dry_run, resume=resume)
    check_loading(precision, device)
    check_libraries(run.distill)
    check_revision(run.model, run.revision or None)
    ready = source_of(run) if run.data or not dry_run else None
    main = os.environ.get("RANK", "0") == "0"
    if main:
        typer.echo(as_toml(run))
    pipe = load_pipeline(run.model, precision, device, run.revision or None)
    check_captioned(pipe)
    every_one = run.every == 1 and not run.first
    if (run.config or not every_one) and mixers_of(pipe) and main:
        typer.echo(f"{run.model} is converted anew: the blocks that it has are set aside.\n")
    equip(pipe, None, run.config or None, None if every_one else run.every, run.first)
    if dry_run or ready is None or out is None:
        return print_plan(pipe, run.distill, planned_size(run))
    check_possible(denoiser_of(pipe), run.distill)
    done = going_on(out, run.distill, show=main) if resume else 0
    train(pipe, ready(pipe, out), run, out, prompts=prompt, resume=resume, done=done, show=main)


def check_run(run: Any, out: Path | None, *, dry_run: bool, resume: bool) -> None:
    """Raise a ConvFusionError for a run without a model, or with nowhere to write."""
    if not run.model:
        raise ConvFusionError("which model? Name a pipeline, or `mini`")
    if out is None and not dry_run:
        raise ConvFusionError("--out is needed: a folder for the blocks and checkpoints")
    if out is not None and resume:
        check_folder(out)
    elif out is not None:
        check_new(out, advice="go on with --resume, or choose another folder")


def going_on(out: Path, config: DistillConfig, *, show: bool) -> int:
    """The steps that a run's last checkpoint has behind it; 0 without one.

    Raises:
        ConvFusionError: it is of other settings.
    """
    from convfusion.distill.state import check_same_run, step_of, to_resume

    last = to_resume(out)
    if last:
        check_same_run(last, config.to_dict())
    done = step_of(last) if last else 0
    if show:
        typer.echo(f"Going on after step {done}." if last else f"{out} has no checkpoint: step 1.")
    return done


def train(
    pipe: Any,
    data: Any,
    run: Any,
    out: Path,
    *,
    prompts: list[str] | None,
    resume: bool,
    done: int,
    show: bool,
) -> None:
    """Distil with a progress bar and validation pictures, and write the model card."""
    from convfusion.distill import distill as distil
    from convfusion.distill.card import write_card

    drawn = prompts or list(dict.fromkeys(data.captions))[:4]
    progress = progress_bar()
    progress.disable = not show
    bar = progress.add_task("distilling", total=run.distill.steps, completed=done)
    with progress:
        result = distil(
            pipe,
            data,
            run.distill,
            out,
            resume=resume,
            on_step=lambda step, terms: progress.update(
                bar, completed=step, description=describe(terms)
            ),
            validate=lambda pipe, step: validation_grid(pipe, drawn, guidance_for(run.model, pipe)),
        )
    if not show:
        return
    if result.skipped:
        typer.echo(f"Skipped {result.skipped} steps whose loss or gradient was not finite.")
    if result.stopped:
        typer.echo(f"Stopped after step {result.steps}. Go on with the same command and --resume.")
    else:
        write_card(out, pipe, run, result)
    if result.epsilon_error is not None:
        count = run.distill.held_out
        error = result.epsilon_error
        text = f"{error:.2e}" if math.isfinite(error) else "not finite: the blocks are of no use"
        typer.echo(f"ε-error on {count} samples held out: {text}")
    typer.echo(f"Written: {out}")


def source_of(run: Any) -> Callable[[Any, Path], Any]:
    """What makes the training data of a run, once there is a pipeline.

    What the user named is looked at before the pipeline is loaded.
    """
    from convfusion import mini
    from convfusion.data import Drawing, open_source

    size = parse_size(run.size) if run.size else None
    if not run.data:
        if not is_embedded(run.model):
            raise ConvFusionError("--data is needed: pictures with captions, prompts, or a cache")
        if run.size or run.buckets:
            raise ConvFusionError("--size and --buckets are for data of your own: give --data too")
        return lambda pipe, out: mini.training_data()
    if (Path(run.data) / "cache.json").is_file():
        return lambda pipe, out: cached(pipe, run, size)
    source = open_source(run.data, drawing=Drawing(guidance=guidance_for(run.model)))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConvFusionError(
            "several processes would each encode the data: run `convfusion cache` first, and give "
            "its folder as --data"
        )

    options = {"size": size, "buckets": run.buckets, "num_workers": run.distill.workers}
    return lambda pipe, out: encode(
        pipe, guided_as_it_can(source, run.model, pipe), out / "cache", **options
    )


def cached(pipe: Any, run: Any, size: tuple[int, int] | None) -> Any:
    """The cache that a run names, if it has the buckets that the run asks for."""
    from convfusion.data import open_cache

    found = open_cache(pipe, run.data, size=size)
    if run.buckets and not found.buckets:
        raise ConvFusionError(
            f"{run.data} was built without --buckets: build it anew, or give --no-buckets"
        )
    return found


def planned_size(run: Any) -> tuple[int, int] | None:
    """(height, width) that a dry run tries: as asked for, or the largest that a cache has."""
    from convfusion.data.store import LatentCache

    if run.size:
        return parse_size(run.size)
    if run.data and (Path(run.data) / "cache.json").is_file():
        return max(LatentCache(run.data).sizes, key=math.prod)
    return None


def print_plan(pipe: Any, config: DistillConfig, size: tuple[int, int] | None) -> None:
    """What would train, and what it would take."""
    from datetime import timedelta

    from rich.table import Table

    from convfusion import surgery
    from convfusion.distill.estimate import estimate_run

    found = estimate_run(pipe, config, size)
    typer.echo(str(surgery.status(pipe)))
    total = timedelta(seconds=round(found.seconds_per_step * found.steps))
    peak = "" if found.peak_bytes is None else f"{found.peak_bytes / 2**30:.2f} GiB"
    table = Table(title="Nothing was trained or written", show_header=False)
    for name, value in (
        ("sites that would train", f"{found.converted} of {found.sites}"),
        ("parameters that would train", f"{found.trained / 1e6:.2f}M"),
        ("parameters that stay frozen", f"{found.frozen / 1e6:.2f}M"),
        ("weights, gradients and optimiser", f"{found.held_bytes / 2**30:.2f} GiB"),
        ("at the peak of a step, on the GPU", peak),
        ("a step, here", f"{found.seconds_per_step:.2f} s"),
        (f"all {found.steps} steps, here", str(total)),
    ):
        if value:
            table.add_row(name, value)
    console().print(table)


def validation_grid(pipe: Any, prompts: list[str], guidance: float) -> Any:
    """The prompts drawn by teacher and student from equal seeds."""
    import torch

    from convfusion.families import denoiser_of
    from convfusion.generate import generate, swapped_denoiser
    from convfusion.report import labelled_grid
    from convfusion.surgery import attention_teacher

    with torch.no_grad():
        rows = {"student": generate(pipe, prompts, guidance=guidance)}
        with swapped_denoiser(pipe, attention_teacher(denoiser_of(pipe))):
            rows["teacher"] = generate(pipe, prompts, guidance=guidance)
    return labelled_grid(rows, prompts)
