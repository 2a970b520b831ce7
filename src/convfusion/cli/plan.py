"""`convfusion plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from convfusion.cli.console import console, print_ending
from convfusion.cli.models import (
    check_loading,
    choose_conversion,
    open_stock_pipeline,
    parse_device,
    parse_precision,
)
from convfusion.cli.options import Batch, Config, Device, Precision, Revision, parse_size
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress

if TYPE_CHECKING:
    from convfusion.bench.speed_plan import SpeedPlan

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
    config: Config = None,
    batch: Batch = 2,
    precision: Precision = "float32",
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Measure whether a conversion will be faster on this device, and from which size on."""
    from convfusion.bench.models import PIXELS_PER_LATENT, bench_model, full_size_configs
    from convfusion.bench.runs import with_random_weights
    from convfusion.bench.speed_plan import plan_speed
    from convfusion.families import denoiser_of, latent_scale, pixel_unit_of
    from convfusion.generate import check_size

    wanted = parse_size(size)
    check_loading(precision, device)
    if model in full_size_configs():
        if revision is not None:
            raise ConvFusionError(f"--revision needs a name on the Hub, and {model} is none")
        named = bench_model(model)
        scale, latents = PIXELS_PER_LATENT, named.latents(wanted)
        pipe = with_random_weights(named.denoiser, parse_device(device), parse_precision(precision))
    else:
        pipe = open_stock_pipeline(model, precision, device, revision)
        check_size(pipe, wanted)
        scale = latent_scale(pipe)
        latents = wanted[0] // scale, wanted[1] // scale
    chosen = choose_conversion(denoiser_of(pipe), config)
    with Progress(True) as progress:
        bar = progress.add("measuring")

        def show(case: str) -> None:
            bar.update(bar.done + 1, name=f"measuring: {case}")

        speed = plan_speed(pipe, chosen, latents, batch=batch, on_case=show)
    print_plan(speed, scale, pixel_unit_of(denoiser_of(pipe), scale))
    if model not in full_size_configs():
        print_ending(next_command=("convfusion", "convert", model, "--out", "converted"))


def print_plan(speed: SpeedPlan, scale: int, unit: int) -> None:
    """A line for each kind of site, the whole, and what follows in words."""
    from rich.table import Table

    from convfusion.bench.speed_plan import describe_plan
    from convfusion.families import shorten_path

    height, width = (side * scale for side in speed.size)
    table = Table(title=f"One forward pass at {width}×{height} pixels, batch {speed.batch}")
    for name in ("site", "sites", "tokens", "attention", "block", "speed-up", ""):
        table.add_column(name, justify="left" if name in ("site", "") else "right")
    for site in speed.sites:
        attention, block = site.seconds
        table.add_row(
            f"{shorten_path(site.paths[0])}, C {site.channels}",
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
