"""The figures of an evaluation."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convfusion.evaluate.drawing import OTHER, STUDENT
from convfusion.evaluate.measure import Curves
from convfusion.evaluate.motion import Motion
from convfusion.report import BLUE, FAINT, GREY


def epsilon_errors(curves: Curves, name: str = "ε-error") -> Figure:
    """ε-error over the timestep, by the name that its report has for it."""
    drawn = Figure(figsize=(7, 3), layout="constrained")
    axes = drawn.subplots()
    axes.plot(curves.timesteps, curves.epsilon_errors, "o-", color=BLUE, markersize=4)
    axes.set_xlabel("timestep (right: noise alone)")
    axes.set_ylabel(name)
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


def frame_psnrs(motion: Motion) -> Figure:
    """PSNR over the frame, with bands of one standard error."""
    drawn = Figure(figsize=(7, 3), layout="constrained")
    axes = drawn.subplots()
    for side, words, color, line in (
        (STUDENT, "student, equal noises", BLUE, "o-"),
        (OTHER, "teacher, other noises", GREY, "--"),
    ):
        values = np.array(motion.frame_psnr[side], float)  # None becomes NaN, which is a gap
        errors = np.nan_to_num(np.array(motion.frame_psnr_error[side], float))
        places = range(1, len(values) + 1)
        axes.plot(places, values, line, color=color, markersize=3, label=words)
        axes.fill_between(places, values - errors, values + errors, color=color, alpha=0.2, lw=0)
    axes.set_xlabel("frame")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("PSNR in dB")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT)
    return drawn


def _finish(axes: Axes, values: list[float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT)
    if all(value > 0 for value in values):
        axes.set_yscale("log")
