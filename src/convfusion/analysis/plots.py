"""Figures of an analysis, each a matplotlib `Figure` ready to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from convfusion.analysis.statistics import DecayFit, fitted_distances, name_grid, windows
from convfusion.analysis.study import Analysis, SiteAnalysis
from convfusion.families import shorten_path
from convfusion.report import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, SKY

COLUMNS = 4
STRIP = 9  # frames of a video that are shown, beside the query's own

Panel = Callable[[Axes, SiteAnalysis], None]


def score_mass(analysis: Analysis) -> Figure:
    """ASM over the window side: the attention, its high-frequency part, and uniform attention."""

    def panel(axes: Axes, site: SiteAnalysis) -> None:
        sides = windows(site.grid)
        axes.plot(sides, site.uniform_score_mass, "--", color=GREY)
        axes.plot(sides, site.mean.score_mass, color=BLUE)
        if site.mean.score_mass_high:
            axes.plot(sides, site.mean.score_mass_high, color=ORANGE)
        axes.axhline(analysis.config.share, color=FAINT, zorder=0)
        axes.set_ylim(0, 1.03)

    lines = {"attention": BLUE, "high-frequency part, Λ⁺": ORANGE, "uniform attention": GREY}
    return _panels(analysis, panel, "window side K in tokens", "share of mass in K×K", lines)


def frame_mass(analysis: Analysis) -> Figure:
    """The share of attention within some frames round the query's, of videos."""

    def panel(axes: Axes, site: SiteAnalysis) -> None:
        if site.frames is None or site.mean.frames is None:
            axes.text(0.5, 0.5, "each frame by itself", transform=axes.transAxes, **_NOTE)
            return
        counts = range(1, 2 * len(site.frames.uniform_score_mass), 2)
        axes.plot(counts, site.frames.uniform_score_mass, "--", color=GREY)
        axes.plot(counts, site.mean.frames.score_mass, color=BLUE)
        if site.mean.frames.score_mass_high:
            axes.plot(counts, site.mean.frames.score_mass_high, color=ORANGE)
        axes.axhline(analysis.config.share, color=FAINT, zorder=0)
        axes.set_ylim(0, 1.03)

    lines = {"attention": BLUE, "high-frequency part, Λ⁺": ORANGE, "uniform attention": GREY}
    return _panels(analysis, panel, "window in frames", "share of mass in the window", lines)


def slopes(analysis: Analysis) -> Figure:
    """What each further ring of the window adds: the slope of the curves of `score_mass`."""

    def panel(axes: Axes, site: SiteAnalysis) -> None:
        sides = windows(site.grid)
        axes.plot(sides, _slope(site.uniform_score_mass), "--", color=GREY)
        axes.plot(sides, _slope(site.mean.score_mass), color=BLUE)
        if site.mean.score_mass_high:
            axes.plot(sides, _slope(site.mean.score_mass_high), color=ORANGE)
        axes.set_ylim(bottom=0)

    lines = {"attention": BLUE, "high-frequency part, Λ⁺": ORANGE, "uniform attention": GREY}
    return _panels(analysis, panel, "window side K in tokens", "slope, share per token", lines)


def decay(analysis: Analysis) -> Figure:
    """Mean attention to a key at each distance, with the laws that were fitted."""

    def panel(axes: Axes, site: SiteAnalysis) -> None:
        profile = np.array(site.profile)
        keys = profile[1:] > 0
        axes.plot(np.arange(1, len(profile))[keys], profile[1:][keys], "o", color=INK, markersize=3)
        fit = site.mean.decay
        if fit is None:
            axes.text(0.5, 0.5, "too few distances\nfor a fit", transform=axes.transAxes, **_NOTE)
        else:
            near = np.linspace(1, fitted_distances(site.grid), 60)
            for name, color, style in _LAWS:
                axes.plot(near, fit.value(name, near), style, color=color, linewidth=1.3)
            axes.set_title(law(fit), fontsize=8, loc="right", y=0.86)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.minorticks_off()

    lines = {"mean attention to a key": INK, **{name: color for name, color, _ in _LAWS}}
    return _panels(analysis, panel, "distance d in tokens", "attention", lines)


def law(fit: DecayFit) -> str:
    """The best law with its number, and how much it explains."""
    numbers = {"power": f" {fit.exponent:.2f}", "exponential": f" {fit.length:.1f}"}
    return f"{fit.best}{numbers.get(fit.best, '')} (R² {fit.r2[fit.best]:.2f})"


def receptive_fields(analysis: Analysis, control: Analysis | None = None) -> Figure:
    """ERF of every layer, beside its grid and beside the ERF of uniform attention there."""
    rows = len(analysis.sites)
    figure = Figure(figsize=(9, 1.3 + 0.3 * rows), layout="constrained")
    axes = figure.subplots()
    for y, site in enumerate(analysis.sites):
        axes.plot([site.uniform_receptive_field] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=2)
        others = [f["receptive_field"] for f in site.filters if f["receptive_field"]]
        if others:
            axes.plot([min(others), max(others)], [y, y], color=SKY, linewidth=5, alpha=0.6)
        heads = [h.receptive_field for h in site.heads if h.receptive_field]
        axes.plot(heads, [y - 0.22] * len(heads), "|", color=GREEN, markersize=6)
        for value, marker, color in (
            (site.mean.receptive_field, "o", ORANGE),
            (site.mean.receptive_field_magnitude, "D", PURPLE),
        ):
            if value:
                axes.plot(value, y, marker, color=color, markersize=6)
        untrained_field = control.sites[y].mean.receptive_field if control is not None else None
        if untrained_field:
            axes.plot(untrained_field, y + 0.25, "x", color=GREY)
    grids = [f"{shorten_path(s.path)}  ({name_grid(s.grid)})" for s in analysis.sites]
    marks = [f"{g} *" if s.artefact else g for g, s in zip(grids, analysis.sites, strict=True)]
    axes.set_yticks(range(rows), marks)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("effective receptive field: window side in tokens")
    handles = [
        _handle("mean map", ORANGE, marker="o"),
        _handle("mean map, by |Λ|", PURPLE, marker="D"),
        _handle("single maps, each head", GREEN, marker="|"),
        _handle("other cut-offs and orders", SKY, linewidth=5),
        _handle("uniform attention: no locality", INK, marker="|"),
    ]
    if control is not None:
        handles.append(_handle("untrained model", GREY, marker="x"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    _clean(axes)
    axes.grid(axis="x", color=FAINT)
    return figure


def timesteps(analysis: Analysis) -> Figure:
    """How the maps change from noise to picture, one line per layer."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    kinds = {
        "ERF / ERF of uniform": lambda s, m: (
            (m.receptive_field or math.nan) / s.uniform_receptive_field
        ),
        "entropy": lambda s, m: m.entropy,
        "common to all queries": lambda s, m: m.bias_share,
        "high-frequency share": lambda s, m: m.high_share,
    }
    levels = sorted({site.grid for site in analysis.sites}, reverse=True)
    colors = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
    for axes, (name, value) in zip(figure.subplots(1, 4), kinds.items(), strict=True):
        for site in analysis.sites:
            points = sorted(site.timesteps.items())
            color = colors[levels.index(site.grid) % len(colors)]
            x, y = [t for t, _ in points], [value(site, m) for _, m in points]
            axes.plot(x, y, ".-", color=color, linewidth=1.2, alpha=0.8)
        axes.set_title(name, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.invert_xaxis()
        axes.set_xlabel("timestep (noise → picture)", fontsize=9)
        _clean(axes)
    handles = [
        _handle(f"{name_grid(g)} tokens", colors[i % len(colors)]) for i, g in enumerate(levels)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return figure


def mean_maps(analysis: Analysis) -> Figure:
    """The mean map of a few queries, marked, one row per layer; each map on its own scale.

    Of videos it is a film strip: the frames of one query's map, all of them on one scale.
    """
    rows = len(analysis.sites)
    strips = [_list_pictures(site) for site in analysis.sites]
    columns = max(map(len, strips))
    figure = Figure(figsize=(1.6 * columns + 1.6, 1.55 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, site, strip in zip(grid, analysis.sites, strips, strict=True):
        label = f"{shorten_path(site.path)}\n{name_grid(site.grid)}"
        row[0].text(-0.12, 0.5, label, transform=row[0].transAxes, **_ROW)
        for axes, picture in zip(row, strip, strict=False):
            axes.imshow(picture.values, cmap="magma", vmin=0, vmax=picture.most)
            axes.set_title(picture.title, fontsize=7, pad=2)
            if picture.query is not None:
                y, x = picture.query
                for size, color in ((7, "white"), (9, "black")):
                    style = {"markerfacecolor": "none", "markeredgecolor": color}
                    axes.plot(x, y, "o", markersize=size, **style)
    return figure


class _Picture(NamedTuple):
    """A map of [H][W]: its values, the brightest that is shown, where the query is, its title."""

    values: Any
    most: float | None
    query: tuple[int, ...] | None
    title: str = ""


def _list_pictures(site: SiteAnalysis) -> list[_Picture]:
    """What is shown of a layer: maps of several queries, or frames of one query's map."""
    if site.frames is None:
        return [
            _Picture(values, None, place)
            for values, place in zip(site.shown, site.shown_at, strict=True)
        ]
    video, (at, *place) = np.array(site.shown[0]), site.shown_at[0]
    places = {round(i) for i in np.linspace(0, len(video) - 1, min(len(video), STRIP))}
    return [
        _Picture(video[i], video.max(), tuple(place) if i == at else None, f"frame {i + 1}")
        for i in sorted(places | {at})
    ]


_NOTE: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": GREY}
_ROW: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 9}
_LAWS = (("power", BLUE, "-"), ("quadratic", GREEN, "--"), ("exponential", PURPLE, ":"))


def _slope(curve: list[float]) -> np.ndarray:
    """Per token of window side: a ring further widens the window by two."""
    return np.diff(curve, prepend=0.0) / np.array([1, *[2] * (len(curve) - 1)])


def _panels(
    analysis: Analysis, panel: Panel, xlabel: str, ylabel: str, lines: dict[str, str]
) -> Figure:
    """One small panel per site, with one legend above."""
    rows = math.ceil(len(analysis.sites) / COLUMNS)
    figure = Figure(figsize=(11, 0.7 + 2.3 * rows), layout="constrained")
    every = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, site in zip(every, analysis.sites, strict=False):
        panel(axes, site)
        mark = "  * sinks" if site.artefact else ""
        title = f"{shorten_path(site.path)}  ({name_grid(site.grid)}){mark}"
        axes.set_title(title, fontsize=9)
        _clean(axes)
    for axes in list(figure.axes)[len(analysis.sites) :]:
        axes.set_axis_off()
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    handles = [_handle(name, color) for name, color in lines.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _handle(label: str, color: str, marker: str = "", linewidth: float = 1.8) -> Line2D:
    return Line2D(
        [], [], label=label, color=color, marker=marker, linewidth=0 if marker else linewidth
    )


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
