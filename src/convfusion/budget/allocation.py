"""What a budget is, and what was chosen within it."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convfusion.budget.candidates import Shape, halo_channels
from convfusion.budget.moments import Moments
from convfusion.errors import ConvFusionError
from convfusion.families import Site, shorten_path
from convfusion.mixers import DeltaConv, Halo, MeanOnly, Mixer
from convfusion.mixers.halo import Sides
from convfusion.mixers.tokens import Grid
from convfusion.surgery import ConvertConfig

Unit = Literal["x", "s"]


@dataclass(frozen=True)
class Budget:
    """What all self-attentions, or what replaces them, may cost together.

    Attributes:
        value: more than 0; of operations, more than 1.
        unit: `x`, times fewer operations than the attentions; or `s`, seconds.
    """

    value: float
    unit: Unit = "x"

    def __post_init__(self) -> None:
        if not (1 if self.unit == "x" else 0) < self.value < float("inf"):
            raise ConvFusionError(
                f"a budget is more than 1x, or more than 0s; {self} leaves nothing to choose"
            )

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"

    def limit(self, whole: float) -> float:
        """The most that may be spent, where all attentions cost `whole` in the same unit."""
        return whole / self.value if self.unit == "x" else self.value

    def format(self, whole: float, cost: float) -> str:
        """A cost as a budget would name it."""
        return f"{cost:.3g}s" if self.unit == "s" else f"{whole / cost:.4g}x"

    def explain_bound(self, whole: float, least: float) -> str:
        """What can be had instead, where the cheapest choice costs `least`, as a clause."""
        if self.unit == "s":
            return f"at least {self.format(whole, least)} is needed"
        return f"at most {self.format(whole, least)} can be had"


def parse_budget(text: str) -> Budget:
    """`4x` or `0.8s`.

    Raises:
        ConvFusionError: it is neither.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([x×s])", text.strip().lower())
    if match is None:
        raise ConvFusionError(
            "a budget looks like 4x, for 4 times fewer operations, or 0.8s, for seconds; "
            f"not {text!r}"
        )
    return Budget(float(match[1]), "s" if match[2] == "s" else "x")


@dataclass(frozen=True)
class SiteChoice:
    """What was chosen for one site.

    Attributes:
        site: of the model.
        grid: (H, W) of its tokens.
        mixer: settings of what stands there; None where the attention is kept.
        attention_operations: of its attention, for one sample.
        operations: of what stands there.
        imitation_error: predicted, before training; None where nothing was measured.
        epsilon_error: of the denoiser with this site alone replaced, predicted.
        seconds: of what stands there, where they were measured.
    """

    site: Site
    grid: Grid
    mixer: Mixer | None
    attention_operations: int
    operations: int
    imitation_error: float | None
    epsilon_error: float | None
    seconds: float | None = None


@dataclass(frozen=True)
class Allocation:
    """What was chosen for every site; `str(allocation)` is a table.

    Attributes:
        budget: that it is within.
        latents: (height, width) that it was planned for, of a video with its frames before them.
        sites: in the order of the model.
        basis: what the choice rests on, in words.
        attention_seconds: of all attentions, where seconds were measured.
    """

    budget: Budget
    latents: Grid
    sites: tuple[SiteChoice, ...]
    basis: str
    attention_seconds: float | None = None

    @property
    def before(self) -> int:
        """Operations of all attentions, for one sample."""
        return sum(site.attention_operations for site in self.sites)

    @property
    def after(self) -> int:
        """Operations of what stands at the sites, kept attentions too."""
        return sum(site.operations for site in self.sites)

    @property
    def saving(self) -> float:
        """How many times fewer operations that is."""
        return self.before / self.after

    @property
    def seconds(self) -> float | None:
        """Of what stands at all sites, where they were measured."""
        known = [site.seconds for site in self.sites if site.seconds is not None]
        return sum(known) if known else None

    @property
    def epsilon_error(self) -> float | None:
        """The predicted ε-error of the whole, the sum over the sites; None without moments."""
        known = [site.epsilon_error for site in self.sites if site.epsilon_error is not None]
        return sum(known) if known else None

    def expect(self, imitation: Mapping[str, float], moments: Moments) -> float:
        """The ε-error of the whole by imitation errors that were measured, as the sum over sites.

        Args:
            imitation: by path, as `start_from_attention` gives them; the predicted ones are taken
                where there is none.
            moments: of the model, which have the sensitivities.
        """
        total = 0.0
        for choice in self.sites:
            path = choice.site.path
            error = imitation.get(path, choice.imitation_error or 0.0)
            total += moments.by_path[path].sensitivity * (0.0 if choice.mixer is None else error)
        return total

    def config(self, *, keep_attention: bool = True) -> ConvertConfig:
        """The conversion that puts it into the model.

        Raises:
            ConvFusionError: every attention is kept.
        """
        chosen = {glob.escape(s.site.path): s.mixer for s in self.sites if s.mixer is not None}
        if not chosen:
            raise ConvFusionError(
                f"within {self.budget} every attention can be kept: there is nothing to convert"
            )
        return ConvertConfig(chosen, keep_attention=keep_attention)

    def __str__(self) -> str:
        head = ("site", "mixer", "window", "cells", "keys", "values", "operations", "ε-error")
        rows = [head, *(_describe(site) for site in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(map(_pad, row, widths, range(len(head)))).rstrip() for row in rows]
        return "\n".join([*lines, *self.describe()])

    def describe(self) -> list[str]:
        """What it comes to, a sentence a line."""
        *frames, height, width = self.latents
        of_video = f" and {frames[0]} frames" if frames else ""
        lines = [
            f"At latents of {width}×{height}{of_video} all sites together take "
            f"{self.saving:.2f}× fewer operations: {self.after / 1e9:.4g} instead of "
            f"{self.before / 1e9:.4g} billion."
        ]
        if any(site.site.joint for site in self.sites):
            lines.append(
                "Where text and image share an attention, its projections and what involves the "
                "text stay: they count before and after."
            )
        if self.seconds is not None and self.attention_seconds is not None:
            lines.append(
                f"Measured on this device: {self.seconds:.3g} s instead of "
                f"{self.attention_seconds:.3g} s."
            )
        if self.epsilon_error is not None:
            lines.append(f"Expected ε-error: {self.epsilon_error:.2e}, {self.basis}.")
        else:
            lines.append(f"{self.basis[0].upper()}{self.basis[1:]}.")
        return lines


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < 2 else text.rjust(width)


def _name_sides(sides: Sides) -> str:
    """8, or 4×8×8."""
    return "×".join(map(str, sides)) if isinstance(sides, tuple) else str(sides)


def _describe(choice: SiteChoice) -> tuple[str, ...]:
    mixer, site = choice.mixer, choice.site
    name, window, cells, keys, values = "attention", "", "", "", ""
    if isinstance(mixer, Halo):
        shape = Shape(site.channels, site.heads, choice.grid)
        counts = halo_channels(mixer, shape)
        name, window = "halo", _name_sides(mixer.window)
        cells = str(math.prod(mixer.sides("cells")))
        keys, values = (f"{count}/{site.channels}" for count in counts)
    elif isinstance(mixer, DeltaConv):
        name, window = "ΔConvBlock", str(mixer.kernel_size)
        if mixer.frame_kernel_size:
            window = _name_sides((mixer.frame_kernel_size, *[mixer.kernel_size] * 2))
    elif isinstance(mixer, MeanOnly):
        name = "mean"
    ratio = f"{choice.attention_operations / choice.operations:.2f}×"
    error = "" if choice.epsilon_error is None else f"{choice.epsilon_error:.1e}"
    return (shorten_path(site.path), name, window, cells, keys, values, ratio, error)
