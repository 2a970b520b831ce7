"""The tables of docs/quality.md: how good students are, and what it hangs on."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from pages import one, table, which
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


def share(row: Row) -> str:
    """Of the keys of the largest grid, those within the window or the widest kernel."""
    held = float(row["window_share"])
    return f"{held:.0%}" if held else "–"


def by_mixer(rows: list[Row]) -> dict[str, list[Row]]:
    """By mixer, the runs at its better learning rate, the best mixer first."""
    runs: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[row["mixer"]][row["learning_rate"]].append(row)
    best = {
        name: min(by.values(), key=lambda rows: float(rows[0]["epsilon_error"]))
        for name, by in runs.items()
    }
    return dict(sorted(best.items(), key=lambda pair: mean_error(pair[1])))


def trained(model: str, held_out: str) -> dict[str, list[Row]]:
    """Distilled mixers, as `by_mixer`; of older rows those that were not measured again."""
    rows = [row for row in rows_of("rivals.csv", model) if row["steps"] != "0"]
    again = {row["mixer"] for row in rows if row["held_out"] == "results"}
    found = [row for row in rows if row["held_out"] == held_out]
    return by_mixer([row for row in found if held_out == "results" or row["mixer"] not in again])


def rivals(model: str, held_out: str = "results") -> str:
    """The mixers under one recipe, the best first."""
    best = trained(model, held_out)
    heads = ["in place of self-attention", "ε-error", "rate", "parameters", "fewer operations"]
    lines = [
        [
            name,
            spread(rows),
            "–" if name == "nothing" else rows[0]["learning_rate"],
            millions(rows[0]),
            cost(rows[0]),
            share(rows[0]),
        ]
        for name, rows in best.items()
    ]
    rows = [row for runs in best.values() for row in runs]
    return f"""{which(rows)}

{table([*heads, "keys in its window"], lines)}

{one(rows, "steps")[0]} steps each."""


def untrained() -> str:
    """The mixers as they start, on every model."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    rows = [
        row
        for row in rows_if_any("rivals.csv")
        if row["steps"] == "0" and row["held_out"] != "choice"
    ]
    for row in rows:
        found[row["mixer"]][row["model"]] = row
    models = list(dict.fromkeys(row["model"] for row in rows))
    worst = {model: float(found["nothing"][model]["epsilon_error"]) for model in models}

    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        error = float(row["epsilon_error"])
        return f"{number(error)} (1/{worst[row['model']] / error:.1f}, {cost(row)})"

    lines = [
        [name, *(cell(by.get(model)) for model in models)]
        for name, by in found.items()
        if name != "nothing"
    ]
    lines.append(["nothing", *(number(worst[model]) for model in models)])
    return f"{which(rows)}\n\n{table(['as it starts', *models], lines)}"


def seconds(model: str) -> str:
    """Seconds a picture, the fastest first."""
    rows = sorted(
        rows_of("rivals_seconds.csv", model), key=lambda r: float(r["seconds_per_picture"])
    )
    return table(
        ["in place of self-attention", "seconds a picture"],
        [[row["mixer"], timing(row)] for row in rows],
    )


def rows_of(name: str, model: str) -> list[Row]:
    return [row for row in rows_if_any(name) if row["model"] == model]


def resting_on(name: str, held_out: str) -> list[Row]:
    """Rows that were measured on some held-out pictures."""
    return [row for row in rows_if_any(name) if row["held_out"] == held_out]


def timing(row: Row) -> str:
    """Seconds and the range of the rounds."""
    values = (float(row[name]) for name in ("seconds_per_picture", "least", "most"))
    return "{:.2f} ({:.2f} … {:.2f})".format(*values)


def in_short() -> str:
    """The main mixers on both text-to-image models."""
    named = (
        "halo, r 1/4, n 1/2, 64 cells",
        "7×7 neighbourhood attention",
        "halo, r 1/4, n 1/2",
        "ΔConvBlock",
        "nothing",
    )
    models = [trained(model, "results") for model in ("mini", "pixart")]
    heads = ["in place of self-attention", "UNet: ε-error", "fewer operations"]
    heads += ["transformer: ε-error", "fewer operations", "keys in its window"]
    lines, rows = [], []
    for name in (name for name in named if all(name in model for model in models)):
        found = [model[name] for model in models]
        cells = [cell for runs in found for cell in (number(mean_error(runs)), cost(runs[0]))]
        lines.append([name, *cells, share(found[0][0])])
        rows += found[0] + found[1]
    return f"{which(rows, 'docs/quality.md')}\n\n{table(heads, lines)}"


def mean_error(rows: list[Row]) -> float:
    return statistics.mean(float(row["epsilon_error"]) for row in rows)


def ablation(held_out: str) -> str:
    """What each part brings, in the rows that rest on some held-out pictures."""
    rows = resting_on("ablation.csv", held_out)
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


def layers(held_out: str = "results") -> str:
    """ε-errors by how many sites are replaced, for each kind of blocks in each order."""
    rows = resting_on("layers.csv", held_out)
    whole = max(int(row["attention_operations"]) for row in rows)

    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        gone = int(row["attention_operations"]) - int(row["operations"])
        return f"{number(row['epsilon_error'])} ({gone / whole:.0%})"

    by = {(row["blocks"], row["order"], row["sites"]): row for row in rows}
    columns = list(dict.fromkeys((row["blocks"], row["order"]) for row in rows))
    columns = [column for column in columns if "every" not in column[1]]
    counts = sorted({row["sites"] for row in rows}, key=int)
    lines = [[k, *(cell(by.get((*column, k))) for column in columns)] for k in counts]
    second = [row for row in rows if "every" in row["order"]]
    told = "; ".join(
        f"{row['blocks']}, {row['order']} ({row['sites']} sites): {cell(row)}" for row in second
    )
    heads = ["sites", *(f"{blocks}, {order}" for blocks, order in columns)]
    steps = one(rows, "steps", "seed")[0]
    return f"""{which(rows)}

{table(heads, lines)}

In brackets: how much of the operations of all attention is gone. {steps}
steps each, one seed.{f" And {told}." if told else ""}"""


def another_base(held_out: str = "results") -> str:
    rows = resting_on("another_base.csv", held_out)
    lines = [
        [
            ", ".join(filter(None, (r["blocks"], r["variant"]))),
            r["steps"],
            number(r["epsilon_error"]),
        ]
        for r in rows
    ]
    batches, design = one(rows, "tuning_steps", "design")
    heads = ["in place of the fine-tune's self-attention", "steps in it", "ε-error"]
    return f"""{which(rows)}

{table(heads, lines)}

The fine-tune: {batches} batches of 32 pictures of one design
(`{design}`), all weights. *The base itself* is the whole other model, attention and all,
held against the fine-tune; the rows of *their own base* are held against that."""


def lighter(held_out: str = "results") -> str:
    """Blocks from the costliest to the lightest."""
    rows = resting_on("lighter.csv", held_out)
    rows.sort(key=lambda row: int(row["operations"]), reverse=True)
    lines = [
        [row["blocks"], number(row["epsilon_error"]), cost(row), millions(row), share(row)]
        for row in rows
    ]
    heads = ["blocks", "ε-error", "fewer operations", "parameters", "keys in its window"]
    return f"{which(rows)}\n\n{table(heads, lines)}\n\n{one(rows, 'steps')[0]} steps each."


TABLES: dict[str, Callable[[], Any]] = {
    **{f"rivals {name}": partial(rivals, name) for name in ("mini", "pixart", "large")},
    **{f"rivals {name} before": partial(rivals, name, "first") for name in ("mini", "pixart")},
    "untrained": untrained,
    "seconds mini": partial(seconds, "mini"),
    "parts": partial(ablation, "choice"),
    "parts before": partial(ablation, "first"),
    "layers": layers,
    "layers before": partial(layers, "first"),
    "another base": another_base,
    "another base before": partial(another_base, "first"),
    "lighter": lighter,
    "lighter before": partial(lighter, "first"),
    "in short": in_short,
}
