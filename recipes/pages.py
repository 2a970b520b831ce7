"""Results as Markdown tables: what the pages of tables share."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))
