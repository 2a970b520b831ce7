"""The figures of an evaluation, as a model card shows them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convfusion.errors import CheckpointError
from convfusion.files import read_json, read_tensors
from convfusion.fingerprint import tensors_fingerprint
from convfusion.text import LIST_BYTES, markdown_text, read_text

RECORD, SUMMARY = "evaluation.json", "evaluation.csv"  # as `convfusion evaluate` writes them
STUDENT, TEACHER, OTHER = "student", "teacher", "teacher-other-seed"

# Of each row: the metric, its name, how its numbers are written, and what they are multiplied by.
ROWS = (
    ("epsilon_error", "ε-error, 0 is equal", ".1e", 1.0),
    ("psnr", "PSNR in dB, higher is closer", ".1f", 1.0),
    ("ssim", "SSIM, 1 is equal", ".3f", 1.0),
    ("cosine", "cosine of features, 1 is equal", ".3f", 1.0),
    ("change_ratio", "change from frame to frame, 1 is as much", ".2f", 1.0),
    ("flicker_ratio", "flicker, 1 is as much", ".2f", 1.0),
)
EXCESS = "excess_kernel_distance"


def describe_figures(folder: Path, blocks: Path) -> str:
    """A table of what an evaluation measured, with standard errors, in Markdown.

    Args:
        folder: that `convfusion evaluate` wrote.
        blocks: the file of the blocks that are described.

    Raises:
        CheckpointError: a file is missing or damaged, or the evaluation is of other blocks.
    """
    record = read_json(folder / RECORD, LIST_BYTES)
    try:
        check_same_blocks(folder, record["model"], blocks)
        return fill_table(record, read_rows(folder / SUMMARY))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{folder} is no finished evaluation: {error!r}") from None


def check_same_blocks(folder: Path, model: Mapping[str, Any], blocks: Path) -> None:
    """Refuse an evaluation of other values than those in a file of blocks.

    The evaluation has them in the precision that it drew with.
    """
    dtype = getattr(torch, model["precision"])
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(blocks).items()}
    if model["weights"].get("blocks") != tensors_fingerprint(tensors):
        raise CheckpointError(
            f"the evaluation in {folder} is not of the blocks in {blocks.parent}: evaluate these, "
            "or take it away"
        )


def read_rows(path: Path) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    """Values with their standard errors, by metric, pictures and reference."""
    rows = csv.DictReader(io.StringIO(read_text(path)))
    return {
        (row["metric"], row["pictures"], row["reference"]): (
            float(row["value"]),
            float(row["standard_error"]) if row["standard_error"] else None,
        )
        for row in rows
    }


def fill_table(
    record: Mapping[str, Any], rows: Mapping[tuple[str, str, str], tuple[float, float | None]]
) -> str:
    """The table and what is to be known of it."""
    drawn = record["settings"]
    frames = drawn.get("frames")
    noun = "pictures" if frames is None else "clips"
    lines = [
        f"| against the base model's {noun} | these blocks | the base model, another seed |",
        "| --- | ---: | ---: |",
    ]
    for metric, name, form, factor in ROWS:
        ours = rows.get((metric, STUDENT, TEACHER))
        other = rows.get((metric, OTHER, TEACHER))
        if metric == "epsilon_error" and drawn.get("predicts") == "velocity":
            name = name.replace("ε-error", "velocity error")
        if ours is not None:
            lines.append(f"| {name} | {told(ours, form, factor)} | {told(other, form, factor)} |")
    height, width = drawn["size"]
    length = f"{int(frames)} frames of " if frames else ""
    note = (
        f"Means with standard errors over {int(drawn['samples'])} {noun} of "
        f"{int(drawn['prompts'])} prompts, {length}{int(width)}×{int(height)} pixels, "
        f"{int(drawn['steps'])} steps, guidance {float(drawn['guidance']):g}. The blocks drew them "
        "from the seeds of the base model; the last column is what chance alone comes to."
    )
    excess = rows.get((EXCESS, STUDENT, OTHER))
    if excess is not None and excess[1] is not None:
        network = markdown_text(record["extractor"]["name"])
        note += (
            f" Compared as sets with further {noun} of the base model, the kernel distance of the "
            f"blocks' {noun} exceeds that of its own by {told(excess, '.2f', 1e3)} thousandths "
            f"({network}); up to two standard errors is chance."
        )
    return "\n".join([*lines, "", note, "", f"Measured by ConvFusion {version_of(record)}."])


def version_of(record: Mapping[str, Any]) -> str:
    return markdown_text(record["version"])


def told(pair: tuple[float, float | None] | None, form: str, factor: float) -> str:
    """A value and its standard error; a dash where there is none."""
    if pair is None or not math.isfinite(pair[0]):
        return "–"
    value, error = pair
    words = f"{factor * value:{form}}"
    words += f" ± {factor * error:{form}}" if error is not None else ""
    return words.replace("-", "−") if "e" not in form else words
