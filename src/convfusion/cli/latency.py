"""`convfusion bench latency`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.bench import parse_mixers
from convfusion.cli.console import console, print_ending
from convfusion.cli.models import check_matplotlib, parse_device, parse_precision
from convfusion.cli.options import Batch, Device, Precision, Ratio, Rivals, check_file, parse_size
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress

if TYPE_CHECKING:
    from convfusion.bench.rows import Row


Name = Annotated[
    str,
    typer.Argument(help="sd15, sdxl, pixart, … (every family), mini or the folder of a pipeline."),
]
Sizes = Annotated[list[str], typer.Option(help="WIDTHxHEIGHT in pixels. Repeat for more.")]
Whole = Annotated[
    bool,
    typer.Option(
        "--whole/--sites",
        help="Time the whole denoiser, or each site (self-attention layer) by itself.",
    ),
]
Recorded = Annotated[
    bool,
    typer.Option(help="With --whole: time CUDA graphs, the GPU's work without Python's."),
]
Compiled = Annotated[
    bool, typer.Option(help="Also time ΔConvBlocks and halo blocks under torch.compile.")
]
Backward = Annotated[bool, typer.Option(help="Also compute gradients.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed calls of each variant.")]
WarmUp = Annotated[
    bool, typer.Option(help="With --whole: call each variant once before it is timed.")
]
Limit = Annotated[
    float, typer.Option(min=0, help="Skip what would take more than this many seconds per call.")
]
Csv = Annotated[
    Path | None,
    typer.Option(help="CSV file. In an existing file, cases that are measured again are replaced."),
]
Plot = Annotated[
    Path | None, typer.Option(help="Picture of all times in the CSV file, such as times.png.")
]


def latency(
    model: Name,
    size: Sizes,
    whole: Whole = False,
    mixers: Rivals = None,
    ratio: Ratio = None,
    compiled: Compiled = False,
    recorded: Recorded = False,
    backward: Backward = False,
    batch: Batch = 2,
    rounds: Rounds = 5,
    warm_up: WarmUp = True,
    limit: Limit = 60.0,
    out: Csv = None,
    plot: Plot = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Time attention, ΔConvBlocks and other replacements on this device, with random weights."""
    from convfusion.bench.counts import list_contenders
    from convfusion.bench.latency import Variant
    from convfusion.bench.models import bench_model
    from convfusion.bench.rows import read_rows
    from convfusion.bench.runs import Conditions, denoiser_rows, site_rows, with_compiled

    check_file(out)
    check_file(plot)
    if plot is not None:
        check_matplotlib("give --out for the numbers alone")
    before = read_rows(out) if out is not None and out.exists() else []
    bench_case = bench_model(model)
    configs = list_contenders(bench_case, parse_mixers(mixers), ratio or (0.5,))
    variants = {name: Variant(config) for name, config in configs.items()}
    variants = with_compiled(variants) if compiled else variants
    sizes = sorted(map(parse_size, size), key=math.prod)
    for pixels in sizes:
        bench_case.latents(pixels)
    place, dtype = parse_device(device), parse_precision(precision)
    if recorded and place.type != "cuda":
        raise ConvFusionError(f"--recorded times CUDA graphs, which {place.type} does not have")
    if recorded and not whole:
        raise ConvFusionError("--recorded times the whole denoiser: add --whole")
    under = Conditions(place, dtype, batch, backward, rounds, warm_up, recorded, limit)
    measure = denoiser_rows if whole else site_rows
    cases = show_cases(lambda say: measure(bench_case, variants, sizes, under, say))
    print_rows(collect_rows(cases, before, out, plot))
    print_ending(*(file for file in (out, plot) if file is not None))


def collect_rows(
    cases: Iterable[list[Row]], before: list[Row], out: Path | None, plot: Path | None
) -> list[Row]:
    """The rows of all cases; the table is written after each of them, the picture at the end."""
    from convfusion.bench.rows import renew_rows, write_rows

    rows: list[Row] = []
    for case in cases:
        rows += case
        if out is not None:
            write_rows(out, renew_rows(before, rows))
    if plot is not None:
        from convfusion.bench import plots

        plots.latency(renew_rows(before, rows)).savefig(plot, dpi=150)
    return rows


def show_cases(measure: Any) -> Any:
    """What a benchmark yields, while the terminal shows which case it measures."""
    with Progress(True) as progress:
        bar = progress.add("measuring")
        yield from measure(lambda case: bar.update(bar.done + 1, name=f"measuring: {case}"))


def print_rows(rows: Sequence[Row]) -> None:
    """A line for each variant of each case, and from which size on it is the faster one."""
    from rich.table import Table

    from convfusion.bench.rows import ATTENTION, find_crossovers
    from convfusion.families import shorten_path

    attention = {row.case: row.median_ms for row in rows if row.variant == ATTENTION}
    table = Table(
        title=f"{rows[0].model}, {rows[0].dtype}, batch {rows[0].batch}, {rows[0].device}"
    )
    for name in ("site", "tokens", "variant", "median", "spread", "speed-up", "memory"):
        table.add_column(name, justify="left" if name in ("site", "variant") else "right")
    for before, row in zip([None, *rows], rows, strict=False):
        new = before is None or before.case != row.case
        where = (shorten_site(row), f"{row.tokens:,}") if new else ("", "")
        if new and before is not None and before.series != row.series:
            table.add_section()
        if row.median_ms is None:
            table.add_row(*where, row.variant, row.note)
            continue
        stock = attention.get(row.case)
        table.add_row(
            *where,
            row.variant,
            f"{row.median_ms:,.1f} ms",
            f"{row.spread:.0%}",
            "" if stock is None else f"{stock / row.median_ms:.2f}×",
            "" if row.peak_mib is None else f"{row.peak_mib:,.0f} MiB",
        )
    console().print(table)
    names = {row.series: shorten_path(row.site) if row.site else "the denoiser" for row in rows}
    for each in find_crossovers(rows):
        if each.tokens is None:
            said = "slower than attention at the largest size"
        elif each.always:
            said = "faster at all of these sizes"
        else:
            said = f"faster from about {each.tokens:,.0f} tokens on"
        typer.echo(f"{names[each.series]}, {each.variant}: {said}")


def shorten_site(row: Row) -> str:
    from convfusion.families import shorten_path

    if not row.site:
        return "all"
    kernel = f", K {row.kernel_size}" if row.kernel_size else ""
    return f"{shorten_path(row.site)} ×{row.count}, C {row.channels}{kernel}"
