"""`convfusion distill`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.cache import encode, fit_guidance
from convfusion.cli.console import console, format_terms, print_ending
from convfusion.cli.fields import with_fields
from convfusion.cli.models import (
    check_loading,
    check_revision,
    choose_guidance,
    equip,
    is_embedded,
    is_first_process,
    open_pipeline,
)
from convfusion.cli.options import (
    Config,
    Data,
    Device,
    Every,
    Frames,
    Out,
    Revision,
    SettingsFile,
    Size,
    check_folder,
    check_new,
    parse_size,
)
from convfusion.distill.config import DistillConfig
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress, announced

if TYPE_CHECKING:
    from convfusion.distill import DistillResult
    from convfusion.distill.settings import RunSettings

NamedModel = Annotated[
    str | None,
    typer.Argument(
        help="A diffusers pipeline: a folder, a name on the Hub or a .safetensors file; or "
        "`mini`, `mini-delta`, `mini-teacher`."
    ),
]
Buckets = Annotated[
    bool | None,
    typer.Option("--buckets/--no-buckets", help="Group pictures by their ratio of sides."),
]
NamedFirst = Annotated[
    int | None,
    typer.Option(min=0, help="With --every: which site is the first, counted from 0."),
]
Recipe = Annotated[
    str | None,
    typer.Option(help="convfusion or paper: what training options that are not given are."),
]
ValidationPrompt = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompt of a validation picture. Default: the first captions, 4 or of clips 2."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what would be trained, its memory and time, and stop."),
]
NamedPrecision = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32.")
]


@with_fields(DistillConfig)
def distill(
    training: dict[str, Any],
    model: NamedModel = None,
    out: Out = None,
    settings: SettingsFile = None,
    data: Data = None,
    size: Size = None,
    frames: Frames = None,
    buckets: Buckets = None,
    config: Config = None,
    every: Every = None,
    first: NamedFirst = None,
    recipe: Recipe = None,
    prompt: ValidationPrompt = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    precision: NamedPrecision = None,
    device: Device = None,
) -> None:
    """Train the blocks of a pipeline to do what its own attention did.

    Ctrl-C finishes the current step, saves and stops. `convfusion distill --out FOLDER --resume`
    continues with the settings that the run keeps in its folder.
    """
    from convfusion.distill.environment import check_libraries, check_possible
    from convfusion.distill.settings import as_toml
    from convfusion.families import check_captioned, denoiser_of
    from convfusion.surgery import mixers_of

    named: dict[str, Any] = {"model": model, "data": data, "size": size, "buckets": buckets}
    named |= {
        "frames": frames,
        "revision": revision,
        "config": config,
        "every": every,
        "first": first,
    }
    named |= {"recipe": recipe, "precision": precision}
    run = gather_settings(settings, {**named, "distill": training}, out, resume=resume)
    check_run(run, None if dry_run else out, dry_run=dry_run, resume=resume)
    check_loading(run.precision, device)
    check_libraries(run.distill)
    check_revision(run.model, run.revision or None)
    ready = prepare_source(run) if run.data or not dry_run else None
    main = is_first_process()
    if main:
        typer.echo(as_toml(run))
    pipe = open_pipeline(run.model, run.precision, device, run.revision or None)
    check_captioned(pipe)
    every_one = run.every == 1 and not run.first
    if (run.config or not every_one) and mixers_of(pipe) and main:
        typer.echo(f"{run.model} is converted again: the blocks that it has are set aside.\n")
    equip(pipe, None, run.config or None, None if every_one else run.every, run.first)
    if dry_run or ready is None or out is None:
        return print_plan(pipe, run.distill, choose_plan_size(run))
    check_possible(denoiser_of(pipe), run.distill)
    done = find_progress(out, run.distill, show=main) if resume else 0
    train(pipe, ready(pipe, out), run, out, prompts=prompt, resume=resume, done=done, show=main)


def gather_settings(
    file: Path | None, named: dict[str, Any], out: Path | None, *, resume: bool
) -> RunSettings:
    """The settings of a file or, for a run that is resumed, of its folder, and those named.

    Raises:
        ConvFusionError: a run is resumed that keeps no settings, and no model is named.
    """
    from convfusion.distill.settings import read_settings, run_settings

    if file is None and resume and out is not None:
        check_folder(out)
        kept = run_settings(out)
        if kept.is_file():
            file = kept
        elif named["model"] is None:
            raise ConvFusionError(
                f"{out} keeps no settings of a run to resume: it has no {kept.name}. Give the "
                "model and the other settings again"
            )
    return read_settings(file, named)


def check_run(run: RunSettings, out: Path | None, *, dry_run: bool, resume: bool) -> None:
    """Raise a ConvFusionError for a run without a model, or with nowhere to write."""
    if not run.model:
        raise ConvFusionError("which model? Name a pipeline, such as `mini`")
    if out is None and not dry_run:
        raise ConvFusionError("--out is needed: a folder for the blocks and checkpoints")
    if out is not None and resume:
        check_folder(out)
    elif out is not None:
        check_new(out, advice="continue with --resume, or choose another folder")


def find_progress(out: Path, config: DistillConfig, *, show: bool) -> int:
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
        typer.echo(
            f"Continuing after step {done}." if last else f"{out} has no checkpoint: starting anew."
        )
    return done


def train(
    pipe: Any,
    data: Any,
    run: RunSettings,
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
    from convfusion.distill.settings import as_toml, run_settings
    from convfusion.distill.validation import draw_validation
    from convfusion.families import native_frames
    from convfusion.files import write_text

    clips = native_frames(pipe) > 0
    drawn = prompts or list(dict.fromkeys(data.captions))[: 2 if clips else 4]
    size = data.largest if clips else None
    scale = choose_guidance(run.model, pipe)
    with Progress(show) as progress:
        bar = progress.add("distilling", total=run.distill.steps, done=done)

        def on_step(step: int, terms: dict[str, float]) -> None:
            if show and bar.done == done:  # not before it is known that the run can start
                write_text(run_settings(out), as_toml(run))
            bar.update(step, name=f"distilling  {format_terms(terms)}")
            if step == run.distill.steps:
                progress.say("Training is done. Measuring and saving …")

        result = distil(
            pipe,
            data,
            run.distill,
            out,
            resume=resume,
            on_step=on_step,
            validate=lambda pipe, step: draw_validation(pipe, drawn, scale, size),
        )
    if not show:
        return
    if not result.stopped:
        write_card(out, pipe, run, result)
    print_outcome(run, out, result, drawn[0], size)


def print_outcome(
    run: RunSettings, out: Path, result: DistillResult, prompt: str, size: tuple[int, ...] | None
) -> None:
    """How a run ended, what it wrote, and how to go on; `size` is that of clips."""
    if result.skipped:
        typer.echo(f"Skipped {result.skipped} steps whose loss or gradient was not finite.")
    if result.stopped:
        print_ending(
            out,
            verdict=f"Stopped after step {result.steps} of {run.distill.steps}. It is saved.",
            next_command=("convfusion", "distill", "--out", out, "--resume"),
        )
        return
    verdict = ""
    if result.epsilon_error is not None:
        verdict = describe_error(result.epsilon_error, run.distill.held_out)
    base = "mini-teacher" if is_embedded(run.model) else run.model
    given = (base, "--blocks", out, "--prompt", prompt)
    command: tuple[Any, ...] = ("convfusion", "compare", *given, "--out", "comparison.png")
    if size is not None:
        frames, height, width = size
        sides = ("--frames", str(frames), "--size", f"{width}x{height}")
        command = ("convfusion", "generate", *given, *sides, "--out", "clips")
    print_ending(out, verdict=verdict, next_command=command)


def describe_error(error: float, count: int) -> str:
    """An ε-error over held-out samples in words."""
    text = f"ε-error on {count} held-out samples: "
    if not math.isfinite(error):
        return f"{text}not finite, so these blocks are of no use. Try a lower --learning-rate."
    return (
        f"{text}{error:.2e}. What is predicted with the blocks differs from what is predicted with "
        f"attention by {math.sqrt(error):.1%} of its size."
    )


def prepare_source(run: RunSettings) -> Callable[[Any, Path], Any]:
    """What makes the training data of a run, once there is a pipeline.

    What the user named is looked at before the pipeline is loaded.
    """
    from convfusion import mini
    from convfusion.data import Drawing, open_source

    size = parse_size(run.size) if run.size else None
    if not run.data:
        if not is_embedded(run.model):
            raise ConvFusionError("--data is needed: pictures with captions, prompts, or a cache")
        if run.size or run.frames or run.buckets:
            raise ConvFusionError(
                "--size, --frames and --buckets are for data of your own: give --data too"
            )
        return lambda pipe, out: mini.training_data()
    if (Path(run.data) / "cache.json").is_file():
        return lambda pipe, out: open_cached(pipe, run, size)
    source = open_source(run.data, drawing=Drawing(guidance=choose_guidance(run.model)))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConvFusionError(
            "several processes would each encode the data: run `convfusion cache` first, and give "
            "its folder as --data"
        )

    options = {
        "size": size,
        "frames": run.frames or None,
        "buckets": run.buckets,
        "num_workers": run.distill.workers,
    }
    return lambda pipe, out: encode(
        pipe, fit_guidance(source, run.model, pipe), out / "cache", **options
    )


def open_cached(pipe: Any, run: RunSettings, size: tuple[int, int] | None) -> Any:
    """The cache that a run names, if it has the buckets that the run asks for."""
    from convfusion.data import open_cache

    cache = open_cache(pipe, run.data, size=size, frames=run.frames or None)
    if run.buckets and not cache.buckets:
        raise ConvFusionError(
            f"{run.data} was built without --buckets: build it again, or give --no-buckets"
        )
    return cache


def choose_plan_size(run: RunSettings) -> tuple[int, ...] | None:
    """What a dry run tries: as asked for, or the largest that a cache has.

    It is (height, width), or (frames, height, width) of clips.
    """
    from convfusion.data.store import LatentCache

    if run.size:
        return (*([run.frames] if run.frames else []), *parse_size(run.size))
    if run.data and (Path(run.data) / "cache.json").is_file():
        return LatentCache(run.data).largest
    return None


def print_plan(pipe: Any, config: DistillConfig, size: tuple[int, ...] | None) -> None:
    """What would train, and what it would take."""
    from rich.table import Table

    from convfusion import surgery
    from convfusion.distill.estimate import estimate_run

    with announced("Trying three steps on noise …", True):
        planned = estimate_run(pipe, config, size)
    typer.echo(str(surgery.status(pipe)))
    table = Table(title="Nothing was trained or written", show_header=False)
    for name, value in planned.describe().items():
        table.add_row(name, value)
    console().print(table)
    typer.echo("Next: the same command without --dry-run.")
