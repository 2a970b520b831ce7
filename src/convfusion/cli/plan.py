"""`convfusion plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from convfusion.cli.console import console
from convfusion.cli.models import (
    check_loading,
    conversion_for,
    stock_pipeline,
    torch_device,
    torch_dtype,
)
from convfusion.cli.options import Batch, Config, Device, Precision, Revision, parse_size
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress

if TYPE_CHECKING:
    from convfusion.bench.speed_plan import SpeedPlan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A pipeline: folder, Hub name or `mini`; or sd15, sd21, sdxl, pixart, dit for "
            "that layout with random weights."
        ),
    ],
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the pictures, in pixels.")],
    config: Config = None,
    batch: Batch = 2,
    precision: Precision = "float32",
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Tell before a conversion whether it will be faster here, and from which size on."""

    from convfusion.bench.models import PIXELS_PER_LATENT, bench_model, full_size_configs
    from convfusion.bench.runs import with_random_weights
    from convfusion.bench.speed_plan import plan_speed
    from convfusion.families import denoiser_of, latent_scale, pixel_unit_of
    from convfusion.generate import check_size

    wanted = parse_size(size)
    check_loading(precision, device)
    if model in full_size_configs():
        if revision is not None:
            raise ConvFusionError(f"--revision is of a name on the Hub: {model} is none")
        named = bench_model(model)
        scale, latents = PIXELS_PER_LATENT, named.latents(wanted)
        pipe = with_random_weights(named.denoiser, torch_device(device), torch_dtype(precision))
    else:
        pipe = stock_pipeline(model, precision, device, revision)
        check_size(pipe, wanted)
        scale = latent_scale(pipe)
        latents = wanted[0] // scale, wanted[1] // scale
    chosen = conversion_for(denoiser_of(pipe), config)
    with Progress(True) as progress:
        bar = progress.add("measuring")

        def show(case: str) -> None:
            bar.update(bar.done + 1, name=f"measuring: {case}")

        found = plan_speed(pipe, chosen, latents, batch=batch, on_case=show)
    print_plan(found, scale, pixel_unit_of(denoiser_of(pipe), scale))


def print_plan(found: SpeedPlan, scale: int, unit: int) -> None:
    """A line for each kind of site, the whole, and what follows in words."""
    from rich.table import Table

    from convfusion.families import shorten_path

    height, width = (side * scale for side in found.size)
    table = Table(title=f"One forward pass at {width}×{height} pixels, batch {found.batch}")
    for name in ("site", "sites", "tokens", "attention", "block", "speed-up", ""):
        table.add_column(name, justify="left" if name in ("site", "") else "right")
    for site in found.sites:
        attention, block = site.seconds
        table.add_row(
            f"{shorten_path(site.paths[0])}, C {site.channels}",
            str(len(site.paths)),
            f"{site.tokens:,}",
            seconds(attention),
            seconds(block),
            f"{attention / block:.2f}×",
            "measured" if site.measured else "from the fit",
        )
    table.add_section()
    table.add_row("the rest", "", "", seconds(found.rest), seconds(found.rest), "", "")
    speedup = found.attention / found.converted
    table.add_row(
        "all", "", "", seconds(found.attention), seconds(found.converted), f"{speedup:.2f}×", ""
    )
    console().print(table)
    for line in said(found, scale, unit):
        typer.echo(line)


def said(found: SpeedPlan, scale: int, unit: int) -> list[str]:
    """What a plan means, a sentence a line; sides of pictures are multiples of `unit`."""
    speedup = found.attention / found.converted
    share = 1 - 1 / found.bound
    lines = [
        f"Converted, it would be {speedup:.2f}× as fast; {found.bound:.2f}× is the bound, since "
        f"self-attention takes {share:.0%} of the time."
    ]
    start = found.faster_from
    if start is None:
        lines.append("It is faster at no size: the attention does not grow faster here.")
    elif start == (0, 0):
        lines.append("By the fit it is faster at every size.")
    else:
        height, width = (-(-side * scale // unit) * unit for side in start)  # that can be drawn
        lines.append(f"By the fit it is faster from {width}×{height} pixels on.")
    if found.kept and len(found.kept) < sum(len(site.paths) for site in found.sites):
        lines.append(
            f"The attention is the cheaper one at {len(found.kept)} "
            f"site{'s' if len(found.kept) > 1 else ''}: keeping it there "
            f"(generate --hybrid) makes it {found.attention / found.hybrid:.2f}×."
        )
    dropped, added = (each / 2**20 for each in found.weights)
    lines.append(
        f"Dropping the attention frees {dropped:,.1f} MiB of weights; the blocks take {added:,.1f}."
    )
    return lines


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.2f} ms"
