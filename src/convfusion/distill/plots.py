"""The figures of a replacement curve, and of quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from convfusion.distill.partial import Point, SiteCosts
from convfusion.families import shorten_path
from convfusion.report import BLUE, FAINT, GREEN, INK, ORANGE

if TYPE_CHECKING:
    from convfusion.distill.budget_curve import BudgetPoint

NAMED = 16  # sites; the names of more would cover each other


def draw_curve(costs: SiteCosts, orders: Mapping[str, Sequence[Point]]) -> Figure:
    """ε-error over the number of sites and over the operations gone; one error over the other.

    Args:
        costs: of every site.
        orders: the points of a replacement curve, by the name of each order.
    """
    drawn = Figure(figsize=(11, 3.8), layout="constrained")
    by_number, by_flops, by_site = drawn.subplots(1, 3)
    for points, name, color, style in (
        (orders["by_imitation"], "least imitation error first", BLUE, "o-"),
        (orders["dearest"], "most imitation error first", ORANGE, "s--"),
        (orders["by_epsilon"], "least ε-error alone first", GREEN, "^:"),
    ):
        errors = [point.epsilon_error for point in points]
        gone = [point.flops_gone for point in points]
        for axes, places in ((by_number, range(1, len(points) + 1)), (by_flops, gone)):
            axes.plot(places, errors, style, color=color, label=name, markersize=5)
    by_number.set_xlabel("sites replaced")
    by_number.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_flops.set_xlabel("operations of attention gone")
    by_flops.xaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (by_number, by_flops):
        axes.set_ylabel("ε-error")
        axes.legend(frameon=False, fontsize=9)
    sites = costs.sites
    for site in sites:
        place = (site.imitation_error, site.epsilon_error)
        by_site.plot(*place, "o", color=INK, markersize=4)
        if len(sites) <= NAMED:
            name = shorten_path(site.path)
            by_site.annotate(name, place, (4, 4), textcoords="offset points", fontsize=8)
    by_site.set_xlabel("imitation error of the block alone")
    by_site.set_ylabel("ε-error with this site alone")
    by_site.margins(x=0.2)
    for axes in (by_number, by_flops, by_site):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT)
        axes.tick_params(labelsize=8)
        if all(site.epsilon_error > 0 for site in sites):
            axes.set_yscale("log")
            _ticks(axes.yaxis)
    if all(site.imitation_error > 0 for site in sites):
        by_site.set_xscale("log")
        _ticks(by_site.xaxis)
    return drawn


def draw_budgets(points: Sequence[BudgetPoint]) -> Figure:
    """ε-error over the operations saved: measured and predicted, and measured of equal ranks."""
    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    for choice, what, name, color, style in (
        ("moments", "measured", "chosen by moments", BLUE, "o-"),
        ("moments", "predicted", "the same, as predicted", BLUE, "o:"),
        ("uniform", "measured", "equal ranks everywhere", ORANGE, "s--"),
    ):
        own = [point for point in points if point.choice == choice]
        errors = [getattr(point, what) for point in own]
        savings = [point.saving for point in own]
        axes.plot(savings, errors, style, color=color, label=name, markersize=5)
    axes.set_xlabel("times fewer operations")
    axes.set_ylabel("ε-error before training")
    axes.set_xscale("log")
    if all(point.measured > 0 and point.predicted != 0 for point in points):
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _ticks(axis)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT)
    axes.tick_params(labelsize=8)
    return drawn


def _ticks(axis: Axis) -> None:
    """Numbers on a logarithmic axis, whether it spans decades or a part of one."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axis.set_major_formatter("{x:.3g}" if low > 1e-4 else "{x:.0e}")
    axis.set_minor_locator(NullLocator())
