"""`convfusion plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.budget import (
    Keep,
    MomentsFile,
    Within,
    check_budget,
    choose_within,
    latents_of,
    read_moments,
)
from convfusion.cli.console import console, print_ending
from convfusion.cli.models import (
    check_loading,
    choose_conversion,
    open_stock_pipeline,
    parse_device,
    parse_precision,
)
from convfusion.cli.options import Batch, Config, Device, Frames, Precision, Revision, parse_size
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress

if TYPE_CHECKING:
    from convfusion.bench.speed_plan import SpeedPlan
    from convfusion.mixers.tokens import Grid

Name = Annotated[
    str,
    typer.Argument(
        help="A diffusers pipeline: a folder, a name on the Hub or `mini`. Or sd15, sd21, "
        "sdxl, pixart or dit, for a model of that kind with random weights."
    ),
]
WantedSize = Annotated[str, typer.Option(help="WIDTHxHEIGHT of the pictures, in pixels.")]


def plan(
    model: Name,
    size: WantedSize,
    frames: Frames = None,
    config: Config = None,
    budget: Within = None,
    moments: MomentsFile = None,
    keep: Keep = 0,
    batch: Batch = 2,
    precision: Precision = "float32",
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Measure whether a conversion will be faster on this device, and from which size on.

    With --budget, tell which mixer would stand at which site instead; nothing is timed for a budget
    of operations.
    """
    from convfusion.bench.models import full_size_configs
    from convfusion.bench.speed_plan import plan_speed
    from convfusion.families import denoiser_of, pixel_unit_of

    check_budget(budget, moments, keep)
    if budget is not None and config is not None:
        raise ConvFusionError("a budget chooses the conversion: give --budget or --config")
    wanted = parse_size(size)
    check_loading(precision, device)
    target, scale, latents = open_planned(
        model, wanted, frames, precision, device, revision, timed=budget is None
    )
    known = model in full_size_configs()
    if budget is not None:
        found = read_moments(moments)
        typer.echo(str(choose_within(target, budget, found, keep, latents, batch)))
        if not known:
            again: list[Any] = ["convfusion", "convert", model, "--budget", budget]
            again += ["--moments", moments] if moments else []
            again += ["--keep", keep] if keep else []
            again += ["--frames", frames] if frames else []
            print_ending(next_command=(*again, "--size", size, "--out", "converted"))
        return
    chosen = choose_conversion(denoiser_of(target), config)
    with Progress(True) as progress:
        bar = progress.add("measuring")

        def show(case: str) -> None:
            bar.update(bar.done + 1, name=f"measuring: {case}")

        speed = plan_speed(target, chosen, latents, batch=batch, on_case=show)
    print_plan(speed, scale, pixel_unit_of(denoiser_of(target), scale))
    if not known:
        print_ending(next_command=("convfusion", "convert", model, "--out", "converted"))


def open_planned(
    model: str,
    size: tuple[int, int],
    frames: int | None,
    precision: str,
    device: str | None,
    revision: str | None,
    *,
    timed: bool,
) -> tuple[Any, int, Grid]:
    """What is planned for, its pixels per latent, and the latents of pictures or clips of a size.

    A model that is known by name has random weights, or none where nothing is timed.
    """
    from convfusion.bench.models import bench_model, full_size_configs
    from convfusion.bench.runs import with_random_weights
    from convfusion.families import latent_scale

    if model not in full_size_configs():
        pipe = open_stock_pipeline(model, precision, device, revision)
        return pipe, latent_scale(pipe), latents_of(pipe, size, frames)
    if revision is not None:
        raise ConvFusionError(f"--revision needs a name on the Hub, and {model} is none")
    if frames is not None:
        raise ConvFusionError(
            f"--frames needs a pipeline: {model} is planned with as many as it was trained on"
        )
    named = bench_model(model)
    latents, target = named.latents(size), named.denoiser
    if timed:
        target = with_random_weights(target, parse_device(device), parse_precision(precision))
    return target, named.pixels_per_latent, latents


def print_plan(speed: SpeedPlan, scale: int, unit: int) -> None:
    """A line for each kind of site, the whole, and what follows in words."""
    from rich.table import Table

    from convfusion.bench.speed_plan import describe_plan
    from convfusion.families import shorten_path

    *frames, height, width = speed.size
    of_video = f", {frames[0]} frames of latents" if frames else ""
    pixels = f"{width * scale}×{height * scale} pixels"
    table = Table(title=f"One forward pass at {pixels}{of_video}, batch {speed.batch}")
    for name in ("site", "sites", "tokens", "attention", "block", "speed-up", ""):
        table.add_column(name, justify="left" if name in ("site", "") else "right")
    for site in speed.sites:
        attention, block = site.seconds
        table.add_row(
            f"{shorten_path(site.paths[0])}, C {site.channels}"
            + (", image to image" if site.joint else ""),
            str(len(site.paths)),
            f"{site.tokens:,}",
            format_seconds(attention),
            format_seconds(block),
            f"{attention / block:.2f}×",
            "measured" if site.measured else "from the fit",
        )
    table.add_section()
    table.add_row(
        "the rest", "", "", format_seconds(speed.rest), format_seconds(speed.rest), "", ""
    )
    speedup = speed.attention / speed.converted
    table.add_row(
        "all",
        "",
        "",
        format_seconds(speed.attention),
        format_seconds(speed.converted),
        f"{speedup:.2f}×",
        "",
    )
    console().print(table)
    for line in describe_plan(speed, scale, unit):
        typer.echo(line)


def format_seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.2f} ms"
