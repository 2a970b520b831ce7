"""The figures of an evaluation."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convfusion.evaluate.measure import Curves
from convfusion.report import BLUE, FAINT, GREY


def epsilon_errors(curves: Curves) -> Figure:
    """ε-error over the timestep."""
    drawn = Figure(figsize=(7, 3), layout="constrained")
    axes = drawn.subplots()
    axes.plot(curves.timesteps, curves.epsilon_errors, "o-", color=BLUE, markersize=4)
    axes.set_xlabel("timestep (right: noise alone)")
    axes.set_ylabel("ε-error")
    _finish(axes, curves.epsilon_errors)
    return drawn


def trajectories(curves: Curves) -> Figure:
    """How far latents part on their way through the sampling steps."""
    drawn = Figure(figsize=(7, 3), layout="constrained")
    axes = drawn.subplots()
    places = range(1, len(curves.steps) + 1)
    other = curves.latent_errors_other_seed
    axes.plot(places, other, "--", color=GREY, label="teacher, other noises")
    axes.plot(places, curves.latent_errors, color=BLUE, label="student, equal noises")
    axes.set_xlabel("sampling step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("‖x̂ − x‖² / ‖x‖²")
    axes.legend(frameon=False, fontsize=9)
    _finish(axes, curves.latent_errors + other)
    return drawn


def _finish(axes: Axes, values: list[float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT)
    if all(value > 0 for value in values):
        axes.set_yscale("log")
