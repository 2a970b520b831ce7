"""Folders of clips, whose captions lie beside them or in metadata files."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convfusion.data.clips import VIDEOS, WITHOUT, is_clip
from convfusion.data.contents import digest_files
from convfusion.data.folders import Listing, list_files, list_named, read_beside
from convfusion.data.metadata import METADATA, Entry, read_metadata
from convfusion.data.pictures import PICTURES
from convfusion.data.samples import Ranges, Sample, digest_names, make_sample
from convfusion.errors import ConvFusionError
from convfusion.imports import check_installed


@dataclass(frozen=True)
class ClipFolder(Ranges):
    """Clips of a folder and its subfolders.

    Attributes:
        spec: as the user gave it.
        entries: of the clips; the caption of one without captions here lies in NAME.txt.
        metadata: names of the files that the captions come from.
    """

    spec: str
    entries: tuple[Entry, ...]
    metadata: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def describe(self) -> dict[str, Any]:
        folder = Path(self.spec)
        files = {name: folder / name for name in self.metadata}
        for name, _, problem in self.entries:
            if problem:
                continue
            files[f"{name} text"] = find_beside(folder, name)
            frames = [] if is_clip(name) else list_files(folder / name).files
            files |= {f"{name}/{frame}": folder / name / frame for frame in frames}
            files |= {name: folder / name} if is_clip(name) else {}
        names = digest_names(f"{name} {problem}" for name, _, problem in self.entries)
        contents = f"{names} {digest_files(files)}"
        return {"kind": "clips", "samples": len(self), "contents": contents}

    def read(self, unit: int) -> Iterator[Sample]:
        folder = Path(self.spec)
        for index in self.list_indices(unit):
            name, captions, problem = self.entries[index]
            if problem:
                yield Sample(name, problem=problem)
                continue
            beside = read_beside(find_beside(folder, name))
            yield make_sample(name, folder / name, [*captions, beside])


def find_clips(folder: Path, listing: Listing) -> list[str]:
    """The names of the clips in a folder, in order; none if there are pictures beside them.

    A folder of two pictures or more is a clip if its caption is that of all of them: in a file
    NAME.txt beside the folder NAME, or in a metadata file that names the folder.
    """
    tables = [name for name in listing.files if posixpath.basename(name) in METADATA]
    told = {name.removesuffix(".txt") for name in listing.files if name.endswith(".txt")}
    told |= set(list_named(folder, tables)) if tables else set()
    frames = [name for name in listing.files if name.lower().endswith(PICTURES)]
    homes = Counter(map(posixpath.dirname, frames))
    folders = {home for home, count in homes.items() if home in told and count > 1}
    if homes.keys() - folders:
        return []
    return sorted([*folders, *filter(is_clip, listing.files)], key=lambda name: name.split("/"))


def open_clips(
    spec: str, listing: Listing, clips: Sequence[str], file: str | None, caption: str | None
) -> ClipFolder:
    """The clips of a folder that has some.

    Args:
        spec: the folder.
        listing: of its files.
        clips: what `find_clips` found.
        file: column of metadata files that names the clip, or None to find it.
        caption: column of the captions there, or None to find it.

    Raises:
        ConvFusionError: there are no captions, a metadata file cannot be read, or PyAV is needed
            and missing.
    """
    folder = Path(spec)
    if any(Path(name).suffix.lower() in VIDEOS for name in clips):
        check_installed("av", advice=WITHOUT)
    tables = [name for name in listing.files if posixpath.basename(name) in METADATA]
    if not tables and (file or caption):
        raise ConvFusionError(
            f"{spec} is a folder of clips without a metadata file: it has no column "
            f"{file or caption!r}, and the captions are in .txt files"
        )
    if not tables and not any(os.path.lexists(find_beside(folder, name)) for name in clips):
        text = posixpath.basename(find_beside(Path(), clips[0]).as_posix())
        raise ConvFusionError(
            f"{spec} has clips without captions: {text} should lie beside {clips[0]}"
        )
    entries = read_metadata(folder, tables, file, caption)
    known = {entry.name for entry in entries}
    entries += [Entry(name) for name in clips if name not in known]
    return ClipFolder(spec, tuple(entries), tuple(tables))


def find_beside(folder: Path, clip: str) -> Path:
    """The file that the caption of a clip lies in, unless a metadata file has it."""
    return (folder / clip).with_suffix(".txt") if is_clip(clip) else folder / f"{clip}.txt"
