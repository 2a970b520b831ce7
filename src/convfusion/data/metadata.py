"""Metadata files of picture folders: which caption belongs to which picture."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convfusion.data.samples import CAPTION_NAMES
from convfusion.errors import ConvFusionError, first_line
from convfusion.text import LIST_BYTES, open_plain, read_text, split_lines

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAMES = ("file_name", "image_file_name")  # columns that name the picture


class Entry(NamedTuple):
    """A picture of a folder, or something that would be one if it could be read.

    Attributes:
        name: relative to the folder, with "/".
        captions: what a metadata file holds as its captions.
        problem: why it cannot be used, or ''.
    """

    name: str
    captions: tuple[Any, ...] = ()
    problem: str = ""


Row = tuple[int, dict[str, Any] | None]  # its line, and its columns unless it is damaged


def read_metadata(
    folder: Path,
    tables: Sequence[str],
    image: str | None,
    caption: str | None,
    captioned: bool = True,
) -> list[Entry]:
    """What metadata files say of the pictures of their folders.

    Args:
        folder: of everything.
        tables: names of metadata files in it or in its subfolders.
        image: column that names the picture, or None to find it.
        caption: column of the captions, or None for those of `CAPTION_NAMES`.
        captioned: whether captions are needed.

    Raises:
        ConvFusionError: a file cannot be read, or a column is not found.
    """
    pictures: list[Entry] = []
    for name in tables:
        rows = _read_rows(folder / name)
        columns = list(dict.fromkeys(key for _, row in rows if row is not None for key in row))
        file, captions = _choose_columns(folder / name, columns, image, caption, captioned)
        pictures += _make_entries(folder, name, rows, file, captions)
    return pictures


def _choose_columns(
    table: Path, columns: list[str], image: str | None, caption: str | None, captioned: bool
) -> tuple[str, list[str]]:
    """The column that names the pictures, and those of captions."""
    names = [image, f"{image}_file_name"] if image else FILE_NAMES
    file = next((name for name in names if name in columns), None)
    captions = [n for n in ([caption] if caption else CAPTION_NAMES) if n in columns and n != file]
    if file is None or (captioned and not captions):
        what = "the file of the picture" if file is None else "captions"
        asked = image if file is None else caption
        lacks = f"no column {asked!r} of" if asked else "no column that is known to hold"
        listed = ", ".join(map(str, columns))
        raise ConvFusionError(f"{table} has {lacks} {what}: name one of {listed}")
    return file, captions


def _make_entries(
    folder: Path, table: str, rows: list[Row], file: str, captions: list[str]
) -> list[Entry]:
    home, entries = posixpath.dirname(table), []
    for line, row in rows:
        where = f"{table}, line {line}"
        if row is None:
            entries.append(Entry(where, problem="damaged caption"))
        elif not isinstance(row.get(file), str):
            entries.append(Entry(where, problem="no picture"))
        else:
            name = posixpath.normpath(posixpath.join(home, row[file]))
            inside = not f"{name}/".startswith(("/", "../")) and os.path.lexists(folder / name)
            texts = tuple(row.get(column) for column in captions)
            entries.append(Entry(name, texts, "" if inside else "no picture"))
    return entries


def _read_rows(file: Path) -> list[Row]:
    try:
        if file.suffix == ".parquet":
            return _read_parquet(file)
        text = read_text(file, LIST_BYTES)
        if file.suffix == ".csv":
            table = csv.DictReader(io.StringIO(text, newline=""))
            return [(table.line_num, row) for row in table]
    except csv.Error as error:
        raise ConvFusionError(f"{file} cannot be read: {first_line(error)}") from None
    lines = enumerate(split_lines(text), 1)
    return [(number, _parse_row(line)) for number, line in lines if line.strip()]


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read_parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConvFusionError(
            f"{file} needs the package datasets: pip install 'convfusion[data]'"
        ) from None
    try:
        with open_plain(file) as data:
            return list(enumerate(parquet.read_table(data).to_pylist(), 1))
    except Exception as error:  # of the library below
        raise ConvFusionError(f"{file} cannot be read: {first_line(error)}") from None
