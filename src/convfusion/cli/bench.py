"""`convfusion bench …`: what self-attention costs, and what its rivals cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convfusion.cli.console import console, print_ending
from convfusion.cli.options import Ratio, Rivals, check_file, parse_size

if TYPE_CHECKING:
    from convfusion.bench.counts import Cost
    from convfusion.bench.joint_counts import JointCost

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="sd15, sdxl, pixart, … (every family), mini or a pipeline's folder. Default: all.",
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        help="WIDTHxHEIGHT in pixels. Repeat for more. Default: nine sizes; three where text and "
        "image share attentions."
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(help="CSV file for the cost at every site (self-attention layer) and the totals."),
]
DECIMAL = ("", "k", "M", "G", "T", "P")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")

bench = typer.Typer(
    no_args_is_help=True, help="Measure what self-attention and its replacements cost."
)


@bench.command()
def flops(
    models: Names = None,
    size: Sizes = None,
    mixers: Rivals = None,
    ratio: Ratio = None,
    out: Csv = None,
) -> None:
    """Count operations, parameters and memory from shapes alone: no weights, no GPU."""
    from convfusion.bench.counts import (
        COUNTED,
        COUNTED_JOINT,
        RANKS,
        SIZES,
        add_totals,
        list_contenders,
        operation_table,
        write_costs,
    )
    from convfusion.bench.joint_counts import SIZES as JOINT_SIZES
    from convfusion.bench.joint_counts import count_joint, has_joint_sites
    from convfusion.bench.models import bench_model, model_names

    check_file(out)
    kinds = parse_mixers(mixers)
    measured_models = [bench_model(name) for name in models or model_names()]
    compared = {
        model.name: list_contenders(model, kinds, ratio or (0.5,), RANKS)
        for model in measured_models
    }
    wanted = [parse_size(text) for text in size or ()]
    for model in measured_models:
        for pixels in wanted:
            model.latents(pixels)
    costs: list[Cost] = []
    joint = [model.name for model in measured_models if has_joint_sites(model)]
    for model in measured_models:
        usual = JOINT_SIZES if model.name in joint else SIZES
        sizes = wanted or [pixels for pixels in usual if model.draws(pixels)]
        costs += operation_table(model, sizes, compared[model.name])
        print_totals([cost for cost in add_totals(costs) if cost.model == model.name])
        if model.name in joint:
            print_joint(count_joint(model, sizes, compared[model.name]))
    for line in (*COUNTED, *([COUNTED_JOINT] if joint else [])):
        typer.echo(line)
    if out is not None:
        write_costs(costs, out)
        print_ending(out)


def parse_mixers(mixers: str | None) -> Sequence[str] | None:
    """Names between commas; None where none are given."""
    return None if mixers is None else [kind.strip() for kind in mixers.split(",")]


def print_totals(costs: list[Cost]) -> None:
    """One model: a row for each size and a column for each contender."""
    from rich.table import Table

    from convfusion.bench.counts import compare_with_attention

    table = Table(
        title=f"{costs[0].model}: all {costs[0].sites} self-attention sites, one forward",
        caption="operations · attention's over them · memory of the largest site",
        show_lines=True,
    )
    table.add_column("pixels", no_wrap=True)
    rows: dict[str, list[str]] = {}
    parameters: dict[str, str] = {}
    for cost, ratio in zip(costs, compare_with_attention(costs), strict=True):
        lines = [
            format_number(cost.operations, 1000, DECIMAL),
            "–" if ratio is None else f"{ratio:,.1f}×" if ratio < 100 else f"{ratio:,.0f}×",
            format_number(cost.activation_bytes, 1024, BINARY),
        ]
        rows.setdefault(f"{cost.width}×{cost.height}", []).append("\n".join(lines))
        parameters[cost.mixer] = format_number(cost.parameters, 1000, DECIMAL)
    for name in parameters:
        table.add_column(name.replace(" ", "\n"), justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    table.add_row("parameters", *parameters.values())
    console().print(table)


def print_joint(costs: Sequence[JointCost]) -> None:
    """Of a model whose text and image share attentions: what goes of its operations, and stays."""
    from rich.table import Table

    table = Table(
        title=f"{costs[0].model}: attentions that text and image share, one forward",
        show_lines=True,
        caption=f"operations, with {costs[0].words} tokens of text; those of text and of "
        "projections stay",
    )
    table.add_column("pixels", no_wrap=True)
    for name in ("mixer", "image to image", "text", "projections", "denoiser"):
        table.add_column(name, justify="left" if name == "mixer" else "right", overflow="fold")
    for cost in costs:
        image = describe_change(cost.image_before, cost.image_after)
        denoiser = describe_change(cost.denoiser_before, cost.denoiser_after)
        stay = (format_number(each, 1000, DECIMAL) for each in (cost.text, cost.projections))
        table.add_row(f"{cost.width}×{cost.height}", cost.mixer, image, *stay, denoiser)
    console().print(table)


def describe_change(before: int, after: int) -> str:
    """Operations before and after, and how many times fewer they are, in lines."""
    lines = [f"{format_number(before, 1000, DECIMAL)} →", format_number(after, 1000, DECIMAL)]
    return "\n".join(lines + ([f"{before / after:.3g}×"] if after else []))


def format_number(number: float, step: int, units: tuple[str, ...]) -> str:
    """Three digits and a unit: `format_number(1234, 1000, ("", "k"))` is 1.23 k."""
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / step, power + 1
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {units[power]}".strip()
