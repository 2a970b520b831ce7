"""The tables of docs/quality.md that rest on drawn pictures, or on pictures of other sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from pages import one, table, which
from pages import rows as rows_if_any
from quality_tables import Row, cost, millions, number, resting_on, rows_of, share


def rival_pictures(model: str, held_out: str = "results") -> str:
    """Distances of the pictures to real ones and to the teacher's."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = [row for row in rows_of("rivals_pictures.csv", model) if row["held_out"] == held_out]
    for row in rows:
        found[row["mixer"]][row["reference"]] = row
    heads = ["pictures of"]
    heads += ["KID to real", "beyond the teacher's", "Fréchet"]
    heads += ["KID to the teacher's", "beyond the floor", "Fréchet"]
    lines = [
        [name, *beside(by["real"]), *beside(by["teacher"])]
        for name, by in sorted(found.items(), key=lambda pair: float(pair[1]["teacher"]["kid"]))
    ]
    real = next(iter(found.values()))["real"]["reference_samples"]
    return f"""{which(rows)}

{table(heads, lines)}

{one(rows, "samples")[0]} pictures each, against {real} real ones, and against as many of the
teacher from other noises. KID in thousandths. EfficientNet-Lite0 features."""


def kid(row: Row, name: str = "kid") -> str:
    """Kernel distance, or its excess over the teacher's, with its error, in thousandths."""
    value, error = (1000 * float(row[key]) for key in (name, f"{name}_error"))
    return f"{value:.1f} ± {error:.1f}"


def beside(row: Row) -> tuple[str, str, str]:
    """Kernel distance, its excess over the teacher's own, and Fréchet distance."""
    excess = "–" if row["mixer"] == "the teacher" else kid(row, "kid_excess")
    return kid(row), excess, f"{float(row['frechet']):.1f}"


def sizes(model: str, held_out: str = "results") -> str:
    """Noise errors and ε-errors by the size of the pictures, and the distances of drawn ones."""
    found: dict[tuple[int, int], dict[str, Row]] = defaultdict(dict)
    rows = [row for row in rows_of("sizes.csv", model) if row["held_out"] == held_out]
    for row in rows:
        found[int(row["width"]), int(row["height"])][row["pipeline"]] = row
    students = [name for name in dict.fromkeys(r["pipeline"] for r in rows) if name != "teacher"]
    drawn = any(row["kid"] for row in rows)
    heads = ["pixels", "noise error: teacher", *students]
    heads += [f"ε-error: {students[0]}", *students[1:]]
    if drawn:
        heads += ["KID: teacher", *students, f"beyond the teacher's: {students[0]}", *students[1:]]
    lines = []
    for (width, height), by in found.items():
        line = [f"{width}×{height}"]
        line += [number(by[name]["noise_error"]) for name in ("teacher", *students)]
        line += [reached(by[name]) for name in students]
        if drawn:
            line += [kid(by[n]) if by[n]["kid"] else "–" for n in ("teacher", *students)]
            line += [kid(by[n], "kid_excess") if by[n]["kid"] else "–" for n in students]
        lines.append(line)
    note = f"KID in thousandths, of {one(rows, 'samples')[0]} pictures each." if drawn else ""
    return f"{which(rows)}\n\n{table(heads, lines)}\n\n{note}".rstrip()


def reached(row: Row) -> str:
    """ε-error, and the share of the keys that a window holds at this size."""
    error = number(row["epsilon_error"])
    return f"{error} ({share(row)})" if row["window_share"] else error


def guidance(held_out: str = "results") -> str:
    """Kernel distances to real pictures by guidance scale."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = resting_on("guidance.csv", held_out)
    for row in rows:
        found[row["guidance"]][row["pipeline"]] = row
    names = list(dict.fromkeys(row["pipeline"] for row in rows))
    lines = [[scale, *(kid(by[name]) for name in names)] for scale, by in found.items()]
    scales = table(["guidance", f"KID to real: {names[0]}", *names[1:]], lines)
    note = f"KID in thousandths; {one(rows, 'samples')[0]} pictures each."
    return f"{which(rows)}\n\n{scales}\n\n{note}"


def solvers(held_out: str = "results") -> str:
    """PSNR to the teacher's pictures by the way in which both are drawn."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    rows = resting_on("solvers.csv", held_out)
    for row in rows:
        found[row["solver"], row["steps"], row["guidance"]][row["pipeline"]] = row
    names = list(dict.fromkeys(row["pipeline"] for row in rows))
    lines = [
        [solver, steps, scale, *(psnr(by[name]) for name in names)]
        for (solver, steps, scale), by in found.items()
    ]
    heads = ["solver", "steps", "guidance", *names]
    note = f"Mean PSNR of {one(rows, 'samples')[0]} pairs of pictures, with its standard error."
    return f"{which(rows)}\n\n{table(heads, lines)}\n\n{note}"


def psnr(row: Row) -> str:
    """In dB, with its standard error where that was kept."""
    error = f" ± {float(row['psnr_error']):.1f}" if row["psnr_error"] else ""
    return f"{float(row['psnr']):.1f}{error} dB"


def shipped() -> str:
    """The shipped students: error, pictures, and pictures as sets."""
    rows = rows_if_any("shipped.csv")
    heads = ["", "ε-error", "of *removed*", "PSNR", "KID to the teacher's", "beyond the floor"]
    heads += ["KID to real", "fewer operations", "parameters"]
    lines = []
    for row in rows:
        line = [row["student"], *("–",) * 3]
        if row["epsilon_error"]:
            part = float(row["removed_error"]) / float(row["epsilon_error"])
            line[1:] = [number(row["epsilon_error"]), f"1/{part:.0f}", psnr(row)]
        line += [kid(row, "teacher_kid")]
        line += [kid(row, "teacher_kid_excess") if row["epsilon_error"] else "–"]
        line += [kid(row, "real_kid")]
        line += [cost(row), millions(row)] if row["operations"] else ["1.00×", "–"]
        lines.append(line)
    samples, pairs = one(rows, "samples", "pairs")
    return f"""{which(rows)}

{table(heads, lines)}

ε-error on the whole list; PSNR of {pairs} pairs of pictures; KID in thousandths, {samples} pictures
each, to as many of the teacher from other noises. The floor is the teacher itself."""


def photographs() -> str:
    """Sets of pictures of the model of Fashion-MNIST, against real ones, then the teacher's."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = rows_if_any("photographs.csv")
    for row in rows:
        found[row["pictures"]][row["reference"]] = row
    shares = ["precision", "recall", "density", "coverage"]
    tables = []
    for reference, words in (
        ("test", "Fashion-MNIST’s test pictures"),
        ("teacher", "the teacher's"),
    ):
        heads = [f"against {words}", "ε-error", "KID", "Fréchet", *shares]
        lines = []
        for name, row in ((name, by[reference]) for name, by in found.items() if reference in by):
            error = number(row["epsilon_error"]) if row["epsilon_error"] else "–"
            lines.append([name, error, *distance(row), *(f"{float(row[s]):.2f}" for s in shares)])
        tables.append(table(heads, lines))
    return f"""{tables[0]}

{tables[1]}

{int(one(rows, "samples")[0]):,} pictures each, against as many (the teacher's: from other noises).
KID in thousandths. EfficientNet-Lite0 features."""


def distance(row: Row) -> tuple[str, str]:
    """Kernel distance in thousandths, and Fréchet distance."""
    return kid(row), f"{float(row['frechet']):.1f}"


TABLES: dict[str, Callable[[], Any]] = {
    **{f"pictures {name}": partial(rival_pictures, name) for name in ("mini", "pixart")},
    "pictures mini before": partial(rival_pictures, "mini", "first"),
    **{f"sizes {name}": partial(sizes, name) for name in ("mini", "pixart")},
    "sizes mini before": partial(sizes, "mini", "first"),
    "shipped": shipped,
    "guidance": guidance,
    "guidance before": partial(guidance, "first"),
    "solvers": solvers,
    "solvers before": partial(solvers, "first"),
    "photographs": photographs,
}
