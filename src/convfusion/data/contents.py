"""What tells the contents of a source from others, at a cost that does not grow with its size.

Up to `WHOLE` bytes are read in full, so copies and touched files count as the same, and every edit
is seen. Of more, sizes and times of change are taken, and `BLOCKS` blocks that are evenly spread
over all of it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WHOLE = 256 * 2**20  # bytes
BLOCKS, BLOCK = 1024, 64 * 2**10
ROWS = 1000  # of a table that are read at once


def digest_files(files: Mapping[str, Path]) -> str:
    """16 hex digits that change with the names or contents of files; one may be missing."""
    digest = hashlib.sha256()
    facts = [_stat(path) for path in files.values()]
    sizes = [size for size, _ in facts]
    whole = sum(size for size in sizes if size > 0) <= WHOLE
    for (name, path), (size, changed) in zip(files.items(), facts, strict=True):
        _add(digest, name.encode("utf-8", "surrogatepass"))
        _add(digest, f"{size}" if whole else f"{size} {changed}")
        if whole and size > 0:
            for block in _read_blocks(path):
                digest.update(block)
    if not whole:
        paths = list(files.values())
        for number, start in _spread_blocks(sizes):
            _add(digest, next(_read_blocks(paths[number], start), b""))
    return digest.hexdigest()[:16]


def digest_rows(data: Any, images: Sequence[str], captions: Sequence[str]) -> str:
    """The same of a table of `datasets`, whose captions are always read in full.

    Args:
        data: a `datasets.Dataset` whose pictures are not decoded.
        images: names of the columns of pictures: encoded ones, or their files.
        captions: names of the columns of captions.
    """
    digest = hashlib.sha256()
    for batch in data.select_columns(list(captions)).iter(ROWS):
        for value in (each for name in captions for each in batch[name]):
            _add(digest, json.dumps(value, default=repr))
    pictures = data.select_columns(list(images))
    if data.data.nbytes > WHOLE:
        pictures = pictures.select(sorted({k * len(data) // BLOCKS for k in range(BLOCKS)}))
    named: dict[str, Path] = {}
    for batch in pictures.iter(ROWS // 10):
        for picture in (each for name in images for each in batch[name]):
            path = picture.get("path") if isinstance(picture, dict) else None
            content = picture.get("bytes") if isinstance(picture, dict) else picture
            if content is None and path:
                named[f"{len(named)} {Path(path).name}"] = Path(path)
            part = content if isinstance(content, bytes) else json.dumps(content, default=repr)
            _add(digest, part)
    return hashlib.sha256((digest.hexdigest() + digest_files(named)).encode()).hexdigest()[:16]


def _stat(path: Path) -> tuple[int, int]:
    """Size and time of change of a plain file; -1 if there is none."""
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return -1, 0
    return (facts.st_size, facts.st_mtime_ns) if path.is_file() else (-1, 0)


def _read_blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """A file from a byte on, in blocks; nothing more of one that cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block
    except OSError:
        return


def _spread_blocks(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Places of blocks that are evenly spread over files: the file's number, and the first byte."""
    ends = list(itertools.accumulate(max(0, size) for size in sizes))
    last = ends[-1] - 1
    for k in range(BLOCKS):
        place = k * last // (BLOCKS - 1)
        file = bisect.bisect_right(ends, place)
        before = ends[file - 1] if file else 0
        yield file, max(0, min(place - before, sizes[file] - BLOCK))


def _add(digest: Any, part: str | bytes) -> None:
    part = part.encode() if isinstance(part, str) else part
    digest.update(f"{len(part)}:".encode())  # so that no two lists of parts run into one
    digest.update(part)
