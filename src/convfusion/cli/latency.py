"""`convfusion bench latency`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.models import needs_matplotlib, torch_device, torch_dtype
from convfusion.cli.options import Device, Precision, parse_size
from convfusion.errors import ConvFusionError

if TYPE_CHECKING:
    from convfusion.bench.rows import Row


def latency(
    model: Annotated[
        str, typer.Argument(help="sd15, sd21, sdxl, pixart, dit, mini, or a pipeline's folder.")
    ],
    size: Annotated[
        list[str], typer.Option(help="WIDTHxHEIGHT in pixels; give it again for more.")
    ],
    whole: Annotated[
        bool, typer.Option("--whole/--sites", help="Time the whole denoiser, or site by site.")
    ] = False,
    mixers: Annotated[str, typer.Option(help="Rivals, with commas between.")] = (
        "delta_conv,linfusion,neighbourhood,tome"
    ),
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Channel ratio of the ΔConvBlocks; give it again. By default 0.5."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="Time the ΔConvBlocks under torch.compile too.")
    ] = False,
    backward: Annotated[bool, typer.Option(help="Work out gradients too.")] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="Two are a picture under classifier-free guidance.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Counted calls of each variant.")] = 5,
    warm_up: Annotated[
        bool, typer.Option(help="Of a whole denoiser, an uncounted call of each variant first.")
    ] = True,
    limit: Annotated[
        float, typer.Option(min=0, help="Leave out what would take so many seconds a call.")
    ] = 60.0,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file; in one that is there, cases measured again are replaced."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of all times in the CSV file, such as times.png.")
    ] = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Time attention, ΔConvBlocks and their rivals in turn, with random weights, on this device."""
    from convfusion.bench.flops import contenders
    from convfusion.bench.latency import Variant
    from convfusion.bench.models import bench_model
    from convfusion.bench.rows import read_rows, renewed, write_rows
    from convfusion.bench.runs import Conditions, denoiser_rows, site_rows, with_compiled

    for file in (out, plot):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConvFusionError(f"{file} cannot be a file: name one in a folder that is there")
    if plot is not None:
        needs_matplotlib("--out")
    before = read_rows(out) if out is not None and out.exists() else []
    found = bench_model(model)
    kinds = [kind.strip() for kind in mixers.split(",") if kind.strip()]
    configs = contenders(found, kinds, ratio or (0.5,))
    variants = {name: Variant(config) for name, config in configs.items()}
    if compiled:
        variants = with_compiled(variants)
    sizes = sorted((parse_size(text) for text in size), key=lambda s: s[0] * s[1])
    for each in sizes:
        found.latents(each)
    place, dtype = torch_device(device), torch_dtype(precision)
    under = Conditions(place, dtype, batch, backward, rounds, warm_up, limit)
    rows: list[Row] = []
    measure = denoiser_rows if whole else site_rows
    for case in shown(lambda say: measure(found, variants, sizes, under, say)):
        rows += case
        if out is not None:
            write_rows(out, renewed(before, rows))
    print_rows(rows)
    if plot is not None:
        from convfusion.bench import plots

        plots.latency(renewed(before, rows)).savefig(plot, dpi=150)
    for file in (out, plot):
        if file is not None:
            typer.echo(f"Written: {file}")


def shown(measure: Any) -> Any:
    """What a benchmark yields, while the terminal shows what it is at."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield from measure(status.update)


def print_rows(rows: Sequence[Row]) -> None:
    """A line for each variant of each case, and from which size on it is the faster one."""
    from rich.console import Console
    from rich.table import Table

    from convfusion.analysis.plots import short_name
    from convfusion.bench.rows import ATTENTION, crossovers

    attention = {row.case: row.median_ms for row in rows if row.variant == ATTENTION}
    table = Table(
        title=f"{rows[0].model}, {rows[0].dtype}, batch {rows[0].batch}, {rows[0].device}"
    )
    for name in ("site", "tokens", "variant", "median", "spread", "speed-up", "memory"):
        table.add_column(name, justify="left" if name in ("site", "variant") else "right")
    for before, row in zip([None, *rows], rows, strict=False):
        new = before is None or before.case != row.case
        where = (short_site(row), f"{row.tokens:,}") if new else ("", "")
        if new and before is not None and before.series != row.series:
            table.add_section()
        if row.median_ms is None:
            table.add_row(*where, row.variant, row.note)
            continue
        stock = attention.get(row.case)
        spread = (row.slowest_ms - row.fastest_ms) / row.median_ms  # type: ignore[operator]
        table.add_row(
            *where,
            row.variant,
            f"{row.median_ms:,.1f} ms",
            f"{spread:.0%}",
            "" if stock is None else f"{stock / row.median_ms:.2f}×",
            "" if row.peak_mib is None else f"{row.peak_mib:,.0f} MiB",
        )
    Console().print(table)
    names = {row.series: short_name(row.site) if row.site else "the denoiser" for row in rows}
    for each in crossovers(rows):
        if each.tokens is None:
            said = "slower than attention at the largest size"
        elif each.always:
            said = "faster at all of these sizes"
        else:
            said = f"faster from about {each.tokens:,.0f} tokens on"
        typer.echo(f"{names[each.series]}, {each.variant}: {said}")


def short_site(row: Row) -> str:
    from convfusion.analysis.plots import short_name

    if not row.site:
        return "all"
    kernel = f", K {row.kernel_size}" if row.kernel_size else ""
    return f"{short_name(row.site)} ×{row.count}, C {row.channels}{kernel}"
