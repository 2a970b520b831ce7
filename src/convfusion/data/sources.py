"""Where pictures with captions come from: folders, shards, tables, or the teacher itself."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from convfusion.data.contents import digest_of_files
from convfusion.data.samples import (
    CAPTION_NAMES,
    Ranges,
    Sample,
    Source,
    digest_of,
    make_sample,
)
from convfusion.data.tables import METADATA, SAVED, TABLES, open_rows
from convfusion.errors import ConvFusionError
from convfusion.fields import check_fields
from convfusion.generate import check_numbers

AnyPath = TypeVar("AnyPath", bound=PurePath)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class PictureFolder(Ranges):
    """Pictures of a folder and its subfolders, each with its caption in NAME.txt beside it."""

    spec: str
    pictures: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def description(self) -> dict[str, Any]:
        folder = Path(self.spec)
        files = {
            file: folder / file
            for name in self.pictures
            for file in (name, str(_caption(PurePosixPath(name))))
        }
        return {"kind": "folder", "samples": len(self), "contents": digest_of_files(files)}

    def read(self, unit: int) -> Iterator[Sample]:
        for index in self.within(unit):
            name = self.pictures[index]
            path = Path(self.spec) / name
            try:
                caption = _caption(path).read_bytes()
            except OSError:
                caption = None
            yield make_sample(name, path, caption)


@dataclass(frozen=True)
class Shards:
    """Tar shards as `webdataset` writes them: files of one sample follow each other.

    The standard library reads them: unlike `webdataset` it can tell where a damaged one ends.

    Attributes:
        spec: as the user gave it.
        paths: of the shards; each is one unit.
        image: extension of the pictures, or None to find it.
        caption: extension or JSON field of the captions, or None to find it.
    """

    spec: str
    paths: tuple[Path, ...]
    image: str | None = None
    caption: str | None = None
    total: int | None = field(default=None, init=False)

    @property
    def units(self) -> int:
        return len(self.paths)

    def description(self) -> dict[str, Any]:
        shards = {f"{number} {path.name}": path for number, path in enumerate(self.paths)}
        asked = {"image": self.image, "caption": self.caption}
        return {
            "kind": "shards",
            "shards": self.units,
            "contents": digest_of_files(shards),
            **asked,
        }

    def read(self, unit: int) -> Iterator[Sample]:
        path = self.paths[unit]
        try:
            with tarfile.open(path, "r:") as tar:
                files = (file for file in iter(tar.next, None) if _is_plain(file))
                for key, members in itertools.groupby(files, lambda file: _parted(file.name)[0]):
                    if key:
                        yield self._sample(f"{path.name}/{key}", tar, members)
                # A damaged header ends the list of files as the zeros at the true end do.
                if tar.fileobj is not None:
                    tar.fileobj.seek(tar.offset)
                if tar.fileobj is None or tar.fileobj.read(512) != bytes(512):
                    yield Sample(path.name, problem="damaged shard")
        except (tarfile.TarError, OSError, ValueError):
            yield Sample(path.name, problem="damaged shard")

    def _sample(
        self, name: str, tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo]
    ) -> Sample:
        found = {_parted(member.name)[1]: member for member in members}

        def content(names: Iterable[str]) -> bytes | None:
            member = next((found[name] for name in names if name in found), None)
            file = None if member is None else tar.extractfile(member)
            return None if file is None else file.read()

        picture = content([self.image] if self.image else [kind[1:] for kind in PICTURES])
        caption: Any = content([self.caption] if self.caption else CAPTION_NAMES)
        if caption is None and (text := content(["json"])) is not None:
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError):
                return Sample(name, problem="damaged caption")
            wanted = [self.caption] if self.caption else CAPTION_NAMES
            if isinstance(fields, dict):
                caption = next((fields[key] for key in wanted if key in fields), None)
        return make_sample(name, picture, caption)


@dataclass(frozen=True)
class Drawing:
    """How the teacher draws its own training data.

    Attributes:
        per_prompt: pictures of each prompt.
        seed: of the first picture; the next ones count on.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
    """

    per_prompt: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.per_prompt < 1:
            raise ConvFusionError("per_prompt must be at least 1")
        check_numbers([self.seed], self.steps, self.guidance, 1)


@dataclass(frozen=True)
class Prompts(Ranges):
    """Prompts alone, of which the teacher draws the latents."""

    spec: str
    prompts: tuple[str, ...]
    drawing: Drawing = Drawing()

    def __post_init__(self) -> None:
        last = self.drawing.seed + max(1, len(self)) - 1
        check_numbers([last], self.drawing.steps, self.drawing.guidance, 1)

    def __len__(self) -> int:
        return len(self.prompts) * self.drawing.per_prompt

    def description(self) -> dict[str, Any]:
        return {"kind": "prompts", "prompts": digest_of(self.prompts), **vars(self.drawing)}

    def read(self, unit: int) -> Iterator[Sample]:
        for index in self.within(unit):
            prompt = self.prompts[index // self.drawing.per_prompt]
            seed = self.drawing.seed + index
            yield Sample(f"{prompt!r}, seed {seed}", prompt, seed=seed)


def open_source(
    spec: str,
    *,
    image: str | None = None,
    caption: str | None = None,
    split: str | None = None,
    drawing: Drawing | None = None,
) -> Source:
    """Find out what a user's string stands for, and open it.

    Args:
        spec: a folder of pictures with NAME.txt beside them; a folder with a metadata file, with
            tables, or of `save_to_disk`; a table (.parquet, .arrow);
            `hf:NAME`, a data set of the Hub; tar shards (a folder of them, one, or a pattern such
            as `data-{000..012}.tar`); a .txt file with one prompt per line.
        image: column of the pictures, or their extension in shards; by default it is found.
        caption: column of the captions, or their extension or JSON field in shards.
        split: of a data set with several.
        drawing: how prompts are drawn.

    Raises:
        ConvFusionError: it does not exist, is empty or cannot be read, or a column is not found.
    """
    if spec.startswith("hf:"):
        return open_rows(spec, image, caption, split)
    if re.match(r"[a-z][a-z0-9+.-]*://|pipe:", spec):
        raise ConvFusionError(f"{spec} is not on this machine: copy it to disk, or write hf:NAME")
    path = Path(spec)
    if (path / "cache.json").is_file():
        raise ConvFusionError(f"{spec} is a cache already: it needs no source")
    shards = sorted(path.glob("*.tar")) if path.is_dir() else []
    if not path.exists() and "{" in spec:
        shards = [Path(each) for each in expand_braces(spec)]
        if missing := [each for each in shards if not each.is_file()]:
            raise ConvFusionError(f"{missing[0]} does not exist ({len(missing)} of {spec} do not)")
    elif not path.exists():
        raise ConvFusionError(f"{spec} does not exist; a data set of the Hub is called hf:{spec}")
    if path.suffix == ".tar" and path.is_file():
        shards = [path]
    if shards:
        return Shards(spec, tuple(shards), image, caption)
    if path.suffix.lower() == ".txt" and path.is_file():
        return _open_prompts(path, drawing or Drawing())
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ConvFusionError(f"{spec} is no data: it should be a {', '.join(TABLES)} or .tar")
        return open_rows(spec, image, caption, split)
    return _open_folder(spec, image, caption, split)


def _open_folder(spec: str, image: str | None, caption: str | None, split: str | None) -> Source:
    folder = Path(spec)
    if any((folder / name).is_file() for name in (*SAVED, *METADATA)):
        return open_rows(spec, image, caption, split)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    if not pictures and any(file.suffix in TABLES for file in files):
        return open_rows(spec, image, caption, split)
    if not pictures:
        raise ConvFusionError(f"{spec} has no pictures ({', '.join(PICTURES)}), tables or shards")
    if not any(file.with_suffix(".txt").is_file() for file in pictures):
        text = pictures[0].with_suffix(".txt").name
        raise ConvFusionError(
            f"{spec} has pictures without captions: {text} should lie beside {pictures[0].name}"
        )
    return PictureFolder(spec, tuple(file.relative_to(folder).as_posix() for file in pictures))


def _open_prompts(path: Path, drawing: Drawing) -> Prompts:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConvFusionError(f"{path} is not a text file in UTF-8") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConvFusionError(f"{path} has no prompts: it should hold one per line")
    return Prompts(str(path), prompts, drawing)


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{x,y}` → x, y."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    parts = (
        words.split(",")
        if first is None
        else [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    )
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [rest for part in parts for rest in expand_braces(head + part + tail)]


def _parted(path: str) -> tuple[str, str]:
    """The key of a shard's sample and the extension, split at the first dot of the file's name."""
    folder, slash, name = path.rpartition("/")
    key, _, extension = name.partition(".")
    return (folder + slash + key if key and extension else ""), extension.lower()


def _caption(picture: AnyPath) -> AnyPath:
    return picture.with_suffix(".txt")


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()  # a sparse file may claim any size
