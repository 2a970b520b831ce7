"""Figures of measured times, each a matplotlib `Figure` ready to be saved."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from convfusion.bench.rows import ATTENTION, Row
from convfusion.errors import ConvFusionError
from convfusion.families import shorten_path
from convfusion.report import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, SKY

COLUMNS = 3
COLOURS = (ORANGE, GREEN, PURPLE, SKY, INK, GREY)  # of what stands in the attention's place


def latency(rows: Sequence[Row]) -> Figure:
    """Median time over the number of tokens, both logarithmic: a panel for each kind of site.

    A band shows the fastest and slowest round. Rows of other models, batches or dtypes get panels
    of their own.

    Raises:
        ConvFusionError: nothing was timed.
    """
    timed = [row for row in rows if row.median_ms is not None]
    panels = list(dict.fromkeys(row.series for row in timed))
    if not panels:
        raise ConvFusionError("nothing was timed: there is nothing to plot")
    variants = list(dict.fromkeys(row.variant for row in timed))
    colours = dict(zip([v for v in variants if v != ATTENTION], COLOURS, strict=False))
    colours[ATTENTION] = BLUE
    columns = min(COLUMNS, len(panels))
    down = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * down + 0.7), layout="constrained")
    grid = figure.subplots(down, columns, squeeze=False)
    for axes, series in zip(grid.flat, panels, strict=False):
        own = [row for row in timed if row.series == series]
        for variant in variants:
            _line(axes, [row for row in own if row.variant == variant], colours[variant], variant)
        axes.set_title(_title(own[0]), fontsize=9)
        axes.set(xscale="log", yscale="log")
        axes.grid(color=FAINT, which="major", linewidth=0.6)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.supxlabel("tokens N", fontsize=10)
    figure.supylabel("milliseconds", fontsize=10)
    handles = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    lines, names = list(handles.values()), list(handles)
    figure.legend(lines, names, loc="outside upper center", ncols=6, frameon=False)
    return figure


def _line(axes: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row.tokens)
    if rows:
        tokens = [row.tokens for row in rows]
        middle, low, high = (
            [getattr(row, name) for row in rows]
            for name in ("median_ms", "fastest_ms", "slowest_ms")
        )
        axes.plot(tokens, middle, "o-", color=colour, label=label, markersize=3.5, linewidth=1.4)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)


def _title(row: Row) -> str:
    passes = ", forward and backward" if row.backward else ""
    what = f"{shorten_path(row.site)}: C {row.channels}, K {row.kernel_size}" if row.site else "all"
    return f"{row.model} {what}, batch {row.batch}{passes}"
