"""What training takes, as a table."""

from __future__ import annotations

from collections.abc import Callable

from pages import read, table


def training_cost() -> str:
    """What the paper's recipe takes on a model of SD1.5's size."""
    [row] = read("training_cost.csv")
    samples = int(row["steps"]) * int(row["batch_size"])
    trained, frozen = (int(row[f"{kind}_parameters"]) / 1e6 for kind in ("trained", "frozen"))
    operations = float(row["operations_per_sample"]) / 1e12
    lines = [
        ["parameters trained", f"{trained:.1f}M, with {frozen:,.0f}M frozen"],
        ["operations of a training step, per sample", f"{operations:.2f}·10¹²"],
        [
            "samples of the paper's recipe",
            f"{samples:,}: {int(row['steps']):,} steps of {row['batch_size']}",
        ],
        ["hours at 10¹⁴ operations a second, worked out", f"**{float(row['hours_at_1e14']):.1f}**"],
    ]
    return f"""{table([f"training SD1.5 at {row['size'].replace('x', '×')}", ""], lines)}

A training step works on cached latents. Nothing was trained on a GPU: one that reaches 10¹⁴
operations a second in half precision would take the hours above, one that reaches half as many
twice as long. `convfusion distill --dry-run` measures a step on your machine. From
[results/training_cost.csv](results/training_cost.csv), by `python recipes/training_cost.py`."""


TABLES: dict[str, Callable[[], str]] = {"training cost": training_cost}
