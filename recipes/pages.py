"""Results as CSV, and as Markdown tables: what recipes and the pages of tables share."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def rows(name: str) -> list[dict[str, str]]:
    """As `read`; a file that is not there holds none."""
    return read(name) if (RESULTS / name).is_file() else []


def write(name: str, found: list[dict[str, Any]]) -> None:
    """Results that are all of one run, in place of those that are there."""
    (RESULTS / name).write_text(csv_of(found), newline="")


def csv_of(found: list[dict[str, Any]], *, heads: bool = True) -> str:
    """Rows with the same columns as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    if heads:
        table.writeheader()
    table.writerows(found)
    return text.getvalue()


def has(name: str, key: dict[str, str]) -> bool:
    """Whether the results hold a row with these values; a file that is not there holds none."""
    return any(key.items() <= row.items() for row in rows(name))


def add(name: str, row: dict[str, Any]) -> None:
    """One row more; the first one brings the heads."""
    add_all(name, [row])


def add_all(name: str, found: list[dict[str, Any]]) -> None:
    """Rows that stand or fall together.

    Raises:
        ValueError: they have other columns than those that are there.
    """
    there = rows(name)
    if there and list(there[0]) != list(found[0]):
        raise ValueError(f"{name} has the columns {list(there[0])}, not {list(found[0])}")
    with open(RESULTS / name, "a", newline="") as file:
        file.write(csv_of(found, heads=not there))


def one(found: list[dict[str, str]], *columns: str) -> list[str]:
    """What all rows of a table have in some columns.

    Raises:
        ValueError: they differ, so that they belong in no one table.
    """
    values = []
    for column in columns:
        held = {row[column] for row in found}
        if len(held) > 1:
            raise ValueError(f"one table mixes rows of {column} {', '.join(sorted(held))}")
        values += held
    return values


HELD_OUT = {
    "first": "Older figures, on pictures of the 382 first held out, of which training saw 12; "
    "and blocks that start from the attention had an older start",
    "choice": "On pictures of the list `choice`",
    "results": "On pictures of the list `results`",
}


def which(found: list[dict[str, str]], page: str = "quality.md") -> str:
    """What stands above a table: the held-out pictures that all of its rows rest on.

    Args:
        found: rows of one table.
        page: where the lists are explained, from the page with the table.

    Raises:
        ValueError: they rest on several.
    """
    [name] = one(found, "held_out")
    return f"{HELD_OUT[name]} ([which pictures]({page}#which-pictures))."
