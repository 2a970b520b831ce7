"""The tables of docs/quality.md: how good students are, and what it hangs on."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from pages import one, read, table, which
from pages import rows as rows_if_any

Row = dict[str, str]


def number(value: str | float) -> str:
    return f"{float(value):.2e}"


def spread(rows: list[Row]) -> str:
    """Mean ε-error and, of several seeds, its range."""
    errors = [float(row["epsilon_error"]) for row in rows]
    mean = number(statistics.mean(errors))
    return mean if len(errors) == 1 else f"{mean} ({number(min(errors))} … {number(max(errors))})"


def cost(row: Row) -> str:
    """Operations of the attention over those of the mixers."""
    own = int(row["operations"])
    return f"{int(row['attention_operations']) / own:.2f}×" if own else "–"


def millions(row: Row) -> str:
    return f"{int(row['parameters']) / 1e6:.2f}M"


def best_runs(model: str) -> dict[str, list[Row]]:
    """By mixer, the runs at its better learning rate, the best mixer first."""
    runs: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of("rivals.csv", model):
        runs[row["mixer"]][row["learning_rate"]].append(row)
    best = {
        name: min(by.values(), key=lambda rows: float(rows[0]["epsilon_error"]))
        for name, by in runs.items()
    }
    return dict(sorted(best.items(), key=lambda pair: mean_error(pair[1])))


def rivals(model: str) -> str:
    """The mixers under one recipe, the best first."""
    heads = ["in place of self-attention", "ε-error", "rate", "parameters", "fewer operations"]
    best = best_runs(model)
    lines = [
        [name, spread(rows), rows[0]["learning_rate"], millions(rows[0]), cost(rows[0])]
        for name, rows in best.items()
    ]
    seconds = {row["mixer"]: row for row in rows_of("rivals_seconds.csv", model)}
    if seconds:
        heads.append("seconds a picture")
        for line in lines:
            line.append(timing(seconds[line[0]]))
        whole = seconds["the teacher"]
        lines.insert(0, ["the teacher's own", "0", "–", "–", "1.00×", timing(whole)])
    rows = rows_of("rivals.csv", model)
    return f"""{which(rows)}

{table(heads, lines)}

{one(rows, "steps")[0]} steps each."""


def rows_of(name: str, model: str) -> list[Row]:
    return [row for row in rows_if_any(name) if row["model"] == model]


def timing(row: Row) -> str:
    """Seconds and the range of the rounds."""
    values = (float(row[name]) for name in ("seconds_per_picture", "least", "most"))
    return "{:.2f} ({:.2f} … {:.2f})".format(*values)


def in_short() -> str:
    """A few mixers on both text-to-image models."""
    named = (
        "13×13 neighbourhood attention",
        "7×7 neighbourhood attention",
        "LinFusion's linear attention",
        "ΔConvBlock",
        "one 3×3 depthwise convolution",
        "nothing",
    )
    models = [best_runs(model) for model in ("mini", "pixart")]
    heads = ["in place of self-attention", "UNet: ε-error", "fewer operations"]
    heads += ["transformer: ε-error", "fewer operations"]
    lines = [
        [name, *(cell for m in models for cell in (number(mean_error(m[name])), cost(m[name][0])))]
        for name in named
    ]
    return f"{which(read('rivals.csv'), 'docs/quality.md')}\n\n{table(heads, lines)}"


def mean_error(rows: list[Row]) -> float:
    return statistics.mean(float(row["epsilon_error"]) for row in rows)


def rival_pictures(model: str) -> str:
    """Distances of the pictures to real ones and to the teacher's."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = rows_of("rivals_pictures.csv", model)
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


def ablation(held_out: str) -> str:
    """What each part brings, in the rows that rest on some held-out pictures."""
    rows = [row for row in read("ablation.csv") if row["held_out"] == held_out]
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["part"], row["variant"]].append(row)
    whole = mean_error(next(iter(runs.values())))
    parts = list(dict.fromkeys(part for part, _ in runs))
    lines = [
        [part, name, spread(own), f"{mean_error(own) / whole:.2f}", millions(own[0]), cost(own[0])]
        for (part, name), own in sorted(runs.items(), key=lambda run: parts.index(run[0][0]))
    ]
    heads = ["part", "variant", "ε-error", "over the first", "parameters", "fewer operations"]
    return f"""{which(rows)}

{table(heads, lines)}

{one(rows, "steps")[0]} steps each. A range is that of seeds, and the value before it their mean."""


def layers() -> str:
    rows = read("layers.csv")
    whole = max(int(row["attention_operations"]) for row in rows)

    def cell(row: Row) -> str:
        gone = int(row["attention_operations"]) - int(row["operations"])
        return f"{number(row['epsilon_error'])} ({gone / whole:.0%})"

    orders = [
        order for order in dict.fromkeys(row["order"] for row in rows) if "every" not in order
    ]
    by = {(row["order"], row["sites"]): cell(row) for row in rows}
    counts = sorted({row["sites"] for row in rows}, key=int)
    lines = [[k, *(by[order, k] for order in orders)] for k in counts]
    second = [row for row in rows if "every" in row["order"]]
    told = "; ".join(f"{row['order']} ({row['sites']} sites): {cell(row)}" for row in second)
    return f"""{which(rows)}

{table(["sites", *orders], lines)}

In brackets: how much of the operations of all attention is gone. {one(rows, "steps", "seed")[0]}
steps each, one seed. And {told}."""


def sizes(model: str) -> str:
    found: dict[tuple[int, int], dict[str, Row]] = defaultdict(dict)
    rows = rows_of("sizes.csv", model)
    for row in rows:
        found[int(row["width"]), int(row["height"])][row["pipeline"]] = row
    heads = ["pixels", "noise error: teacher", "student", "ε-error", "KID: teacher", "student"]
    heads.append("difference")
    lines = []
    for (width, height), by in found.items():
        pair = [by["teacher"], by["student"]]
        errors = [number(row["noise_error"]) for row in pair]
        own = number(by["student"]["epsilon_error"])
        distances = [kid(row) if row["kid"] else "–" for row in pair]
        excess = kid(pair[1], "kid_excess") if pair[1]["kid"] else "–"
        lines.append([f"{width}×{height}", *errors, own, *distances, excess])
    samples = one(rows, "samples")[0]
    note = f"KID in thousandths, of {samples} pictures each."
    return f"{which(rows)}\n\n{table(heads, lines)}\n\n{note}"


def another_base() -> str:
    rows = read("another_base.csv")
    lines = [[r["variant"], r["steps"], number(r["epsilon_error"])] for r in rows]
    batches, design = one(rows, "tuning_steps", "design")
    heads = ["in place of the fine-tune's self-attention", "steps of distillation", "ε-error"]
    return f"""{which(rows)}

{table(heads, lines)}

The fine-tune: {batches} batches of 32 pictures of one design
(`{design}`), all weights. *The base itself* is the whole other model, attention and all,
held against the fine-tune; the row of *their own base* is held against that."""


def lighter() -> str:
    rows = read("lighter.csv")
    kernels = list(dict.fromkeys(row["kernels"] for row in rows))
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    by = {(row["ratio"], row["kernels"]): row for row in rows}
    lines = [
        [
            ratio,
            *(f"{number(by[ratio, k]['epsilon_error'])} ({cost(by[ratio, k])})" for k in kernels),
        ]
        for ratio in ratios
    ]
    return f"{which(rows)}\n\n{table(['channel ratio', *(f'K {k}' for k in kernels)], lines)}"


def guidance() -> str:
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = read("guidance.csv")
    for row in rows:
        found[row["guidance"]][row["pipeline"]] = row
    lines = [
        [scale, kid(by["teacher"]), kid(by["student"]), kid(by["student"], "kid_excess")]
        for scale, by in found.items()
    ]
    scales = table(["guidance", "KID to real: teacher", "student", "difference"], lines)
    note = f"KID in thousandths; {one(rows, 'samples')[0]} pictures each."
    return f"{which(rows)}\n\n{scales}\n\n{note}"


def solvers() -> str:
    rows = read("solvers.csv")
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    by: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        by[row["solver"]][row["steps"]] = f"{float(row['psnr']):.1f} dB"
    lines = [[name, *(found[each] for each in steps)] for name, found in by.items()]
    heads = ["solver", *(f"{each} steps" for each in steps)]
    return f"{which(rows)}\n\n{table(heads, lines)}"


def photographs() -> str:
    """Sets of pictures of the model of Fashion-MNIST, against real ones, then the teacher's."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = read("photographs.csv")
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
    **{f"rivals {name}": partial(rivals, name) for name in ("mini", "pixart")},
    **{f"pictures {name}": partial(rival_pictures, name) for name in ("mini", "pixart")},
    **{f"sizes {name}": partial(sizes, name) for name in ("mini", "pixart")},
    "parts": partial(ablation, "choice"),
    "parts before": partial(ablation, "first"),
    "layers": layers,
    "another base": another_base,
    "lighter": lighter,
    "guidance": guidance,
    "solvers": solvers,
    "photographs": photographs,
    "in short": in_short,
}
