"""Results as CSV, and as Markdown tables: what recipes and the pages of tables share."""

from __future__ import annotations

import csv
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


def has(name: str, key: dict[str, str]) -> bool:
    """Whether the results hold a row with these values; a file that is not there holds none."""
    return any(key.items() <= row.items() for row in rows(name))


def add(name: str, row: dict[str, Any]) -> None:
    """One row more; the first one brings the heads."""
    new = not (RESULTS / name).is_file()
    with open(RESULTS / name, "a", newline="") as file:
        table = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)
