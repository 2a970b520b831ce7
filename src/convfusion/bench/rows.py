"""Measured times as rows of a CSV file, and what follows from them."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from convfusion.bench.latency import Measured
from convfusion.errors import ConvFusionError
from convfusion.files import write_csv

ATTENTION = "attention"  # the variant that all others are compared with


@dataclass(frozen=True)
class Row:
    """One variant of one case; numbers that were not measured are None.

    Attributes:
        model: name of the denoiser.
        site: path of the site that stands for its kind; empty for the whole denoiser.
        count: sites of that kind, or of the denoiser.
        channels, kernel_size: of the site.
        width, height: of the picture in pixels.
        tokens: N at the site, or at the denoiser's first site.
        batch: samples.
        dtype: of weights and tokens.
        backward: gradients were worked out too.
        variant: what stood at the site.
        median_ms, fastest_ms, slowest_ms: of the rounds.
        rounds: counted ones.
        peak_mib: memory held above what was held before.
        parity: relative error to the reference.
        note: why it was not timed.
        device, threads, torch, diffusers: where it was measured.
    """

    model: str
    site: str
    count: int
    channels: int | None
    kernel_size: int | None
    width: int
    height: int
    tokens: int
    batch: int
    dtype: str
    backward: bool
    variant: str
    median_ms: float | None
    fastest_ms: float | None
    slowest_ms: float | None
    rounds: int
    peak_mib: float | None
    parity: float | None
    note: str
    device: str
    threads: int | None
    torch: str
    diffusers: str

    @property
    def spread(self) -> float | None:
        """(slowest − fastest) / median; None if it was not timed."""
        if self.slowest_ms is None or self.fastest_ms is None or self.median_ms is None:
            return None
        return (self.slowest_ms - self.fastest_ms) / self.median_ms

    @property
    def series(self) -> tuple[Any, ...]:
        """What stays the same while the size grows."""
        return (self.model, self.site, self.batch, self.dtype, self.backward, self.device)

    @property
    def case(self) -> tuple[Any, ...]:
        """What is measured in one go, all variants in turn."""
        return (*self.series, self.width, self.height)


def make_rows(
    measured: Mapping[str, Measured], case: Mapping[str, Any], where: Mapping[str, Any]
) -> list[Row]:
    """A row for every variant of a case.

    Args:
        measured: by name of the variant.
        case: the fields of `Row` up to `backward`.
        where: of `convfusion.bench.timing.describe_machine`.
    """
    rows = []
    for variant, each in measured.items():
        times: dict[str, Any] = dict.fromkeys(("median_ms", "fastest_ms", "slowest_ms", "peak_mib"))
        if each.timing is not None:
            seconds, peak = each.timing.seconds, each.timing.peak_bytes
            times = {
                "median_ms": _digits(1e3 * each.timing.median),
                "fastest_ms": _digits(1e3 * min(seconds)),
                "slowest_ms": _digits(1e3 * max(seconds)),
                "peak_mib": None if peak is None else _digits(peak / 2**20),
            }
        rounds = 0 if each.timing is None else len(each.timing.seconds)
        parity = None if each.parity is None else float(f"{each.parity:.1e}")
        rows.append(
            Row(
                **case,
                variant=variant,
                **times,
                rounds=rounds,
                parity=parity,
                note=each.note,
                **where,
            )
        )
    return rows


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` wrote.

    Raises:
        ConvFusionError: the file has other columns, or a value that is no number.
    """
    kinds = {each.name: str(each.type) for each in fields(Row)}
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if table.fieldnames != list(kinds):
            raise ConvFusionError(f"{path} is no table of latencies: give a new file")
        try:
            return [Row(**{k: _parsed(v, kinds[k]) for k, v in row.items()}) for row in table]
        except ValueError as error:
            raise ConvFusionError(f"{path} is damaged: {error}") from None


def _parsed(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if kind == "bool":
        return text == "True"
    if not text and "None" in kind:
        return None
    return int(text) if kind.startswith("int") else float(text)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV; a file that is there is whole at any time."""
    write_csv(path, [column.name for column in fields(Row)], (asdict(row) for row in rows))


def renew_rows(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows and new ones; a case that was measured anew loses all its old rows."""
    cases = {row.case for row in new}
    return [row for row in old if row.case not in cases] + list(new)


@dataclass(frozen=True)
class Crossover:
    """From which size on a variant is faster than the attention.

    Attributes:
        series: model, site, batch, dtype, backward and device.
        variant: its name.
        tokens: N at which the two lines meet, between two measured sizes on logarithmic scales;
            the smallest measured N if it is faster at all sizes; None if it is slower at the
            largest.
        always: it is faster at all measured sizes.
        speedup: attention's time over its own, by N.
    """

    series: tuple[Any, ...]
    variant: str
    tokens: float | None
    always: bool
    speedup: dict[int, float]


def find_crossovers(rows: Iterable[Row]) -> list[Crossover]:
    """The crossover of every variant of every series that was measured beside its attention."""
    times: dict[tuple[Any, ...], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if row.median_ms is not None:
            times[row.series][row.variant][row.tokens] = row.median_ms
    crossings = []
    for series, by_variant in times.items():
        attention = by_variant.get(ATTENTION, {})
        for variant, own in by_variant.items():
            shared = sorted(attention.keys() & own.keys())
            if variant != ATTENTION and shared:
                speedup = {n: attention[n] / own[n] for n in shared}
                crossings.append(Crossover(series, variant, *find_meeting(speedup), speedup))
    return crossings


def find_meeting(speedup: Mapping[int, float]) -> tuple[float | None, bool]:
    """Where a speed-up, by N, passes 1 for good, and whether it lies above 1 everywhere."""
    sizes = sorted(speedup)
    if speedup[sizes[-1]] <= 1:
        return None, False
    slower = [i for i, n in enumerate(sizes) if speedup[n] <= 1]
    if not slower:
        return float(sizes[0]), True
    low, high = sizes[slower[-1]], sizes[slower[-1] + 1]
    down, up = -math.log(speedup[low]), math.log(speedup[high])
    share = down / (down + up)
    return math.exp(math.log(low) + share * math.log(high / low)), False


def fit_growth(values: Mapping[int, float]) -> float:
    """The exponent e of value ∝ Nᵉ: the slope of a least-squares line on logarithmic scales."""
    sizes = np.log(list(values))
    return float(np.polyfit(sizes, np.log(list(values.values())), 1)[0])
