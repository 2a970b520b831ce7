"""Folders of pictures, whose captions lie beside them or in metadata files."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from convfusion.data.contents import digest_files
from convfusion.data.metadata import METADATA, Entry, read_metadata
from convfusion.data.pictures import OTHER_PICTURES, PICTURES
from convfusion.data.samples import Ranges, Sample, digest_names, make_sample
from convfusion.errors import ConvFusionError
from convfusion.text import CAPTION_BYTES, read_plain


@dataclass(frozen=True)
class PictureFolder(Ranges):
    """Pictures of a folder and its subfolders.

    Attributes:
        spec: as the user gave it.
        entries: of the pictures; the caption of one without captions here lies in NAME.txt.
        metadata: names of the files that the captions come from.
        captioned: whether captions are needed.
    """

    spec: str
    entries: tuple[Entry, ...]
    metadata: tuple[str, ...] = ()
    captioned: bool = True

    def __len__(self) -> int:
        return len(self.entries)

    def describe(self) -> dict[str, Any]:
        folder = Path(self.spec)
        files = {name: folder / name for name in self.metadata}
        for name, _, problem in self.entries:
            if not problem:
                files |= {name: folder / name, f"{name} text": _find_beside(folder, name)}
        names = digest_names(f"{name} {problem}" for name, _, problem in self.entries)
        contents = f"{names} {digest_files(files)}"
        return {"kind": "folder", "samples": len(self), "contents": contents}

    def read(self, unit: int) -> Iterator[Sample]:
        folder = Path(self.spec)
        for index in self.list_indices(unit):
            name, captions, problem = self.entries[index]
            if problem:
                yield Sample(name, problem=problem)
                continue
            beside = read_beside(_find_beside(folder, name)) if self.captioned else None
            yield make_sample(name, folder / name, [*captions, beside], self.captioned)


class Listing(NamedTuple):
    """What a folder and its subfolders hold, without what is hidden.

    Attributes:
        files: names of plain files, relative to the folder and in order.
        unread: names of what cannot be read, each with the reason.
    """

    files: list[str]
    unread: list[tuple[str, str]]


def list_files(folder: Path) -> Listing:
    """Walk a folder. Links are followed, and what they lead to is listed once.

    Files and folders whose name begins with a dot are left out, as `ls` does: editors, notebooks
    and file managers keep copies there.
    """
    files: list[str] = []
    unread: list[tuple[str, str]] = []
    todo, links, seen = [""], list[str](), set[tuple[int, int]]()
    while todo or links:
        inside = todo.pop() if todo else links.pop(0)  # a folder goes by its own name if it can
        try:
            facts = os.stat(folder / inside)
            if (facts.st_dev, facts.st_ino) in seen:
                unread.append((inside, "folder that is read already"))
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError:
            unread.append((inside or ".", "unreadable folder"))
            continue
        for entry in entries:
            name = posixpath.join(inside, entry.name)
            if entry.name.startswith("."):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:  # a link to nothing or itself
                if not name.endswith(".txt"):  # which is missed at its picture
                    unread.append((name, "broken link"))
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else todo).append(name)
            elif stat.S_ISREG(mode):
                files.append(name)
            elif is_picture(name):
                unread.append((name, "no plain file"))
    return Listing(sorted(files, key=_split_name), sorted(unread))


def is_picture(name: str) -> bool:
    return name.lower().endswith((*PICTURES, *OTHER_PICTURES))


def open_pictures(
    spec: str, listing: Listing, image: str | None, caption: str | None, captioned: bool
) -> PictureFolder:
    """The pictures of a folder that has some.

    Args:
        spec: the folder.
        listing: of its files.
        image: column of metadata files that names the picture, or None to find it.
        caption: column of the captions there, or None to find it.
        captioned: whether captions are needed.

    Raises:
        ConvFusionError: there are no captions, or a metadata file cannot be read.
    """
    folder = Path(spec)
    pictures = [name for name in listing.files if is_picture(name)]
    unread = [Entry(name, problem=problem) for name, problem in listing.unread]
    tables = [name for name in listing.files if posixpath.basename(name) in METADATA]
    if not captioned:
        names = dict.fromkeys([*list_named(folder, tables), *pictures])
        return PictureFolder(spec, (*map(Entry, names), *unread), captioned=False)
    homes = [posixpath.dirname(name) for name in tables]
    if twice := {home for home in homes if homes.count(home) > 1}:
        both = " and ".join(name for name in tables if posixpath.dirname(name) in twice)
        raise ConvFusionError(f"{spec} has {both}: keep the one that is meant")
    if not tables:
        if image or caption:
            raise ConvFusionError(
                f"{spec} is a folder of pictures without a metadata file: it has no column "
                f"{image or caption!r}, and the captions are in .txt files"
            )
        if not any(os.path.lexists(_find_beside(folder, name)) for name in pictures):
            text = posixpath.basename(_find_beside(Path(), pictures[0]).as_posix())
            raise ConvFusionError(
                f"{spec} has pictures without captions: {text} should lie beside {pictures[0]}"
            )
    entries = read_metadata(folder, tables, image, caption)
    known = {entry.name for entry in entries}
    for name in pictures:
        if name not in known:
            listed = any(PurePosixPath(name).is_relative_to(home) for home in homes)
            entries.append(Entry(name, problem="not in the metadata file" if listed else ""))
    entries += [entry for entry in unread if entry.name not in known]
    return PictureFolder(spec, tuple(entries), tuple(tables))


def list_named(folder: Path, tables: list[str]) -> list[str]:
    """The pictures that metadata files name, in their order, if they can be read."""
    try:
        entries = read_metadata(folder, tables, None, None, captioned=False)
    except ConvFusionError:
        return []
    return [entry.name for entry in entries if not entry.problem]


def _find_beside(folder: Path, picture: str) -> Path:
    return (folder / picture).with_suffix(".txt")


def read_beside(file: Path) -> bytes | ConvFusionError | None:
    """The content of a caption's file, the error of reading it, or None if there is none."""
    try:
        return read_plain(file, CAPTION_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        return ConvFusionError(f"{file} cannot be read: {error.strerror}")


def _split_name(name: str) -> list[str]:
    return name.split("/")
