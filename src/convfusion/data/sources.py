"""Where pictures or clips with captions come from: folders, shards, tables, or the teacher."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convfusion.data.clip_folders import find_clips, open_clips
from convfusion.data.folders import is_picture, list_files, open_pictures
from convfusion.data.pictures import PICTURES
from convfusion.data.samples import Ranges, Sample, Source, digest_names
from convfusion.data.shards import Shards
from convfusion.data.tables import SAVED, TABLES, open_rows
from convfusion.errors import ConvFusionError
from convfusion.generate import check_numbers
from convfusion.settings import check_fields
from convfusion.text import read_prompts

BRACES = 1_000_000  # names that a pattern may stand for


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

    def describe(self) -> dict[str, Any]:
        return {"kind": "prompts", "prompts": digest_names(self.prompts), **vars(self.drawing)}

    def read(self, unit: int) -> Iterator[Sample]:
        for index in self.list_indices(unit):
            prompt = self.prompts[index // self.drawing.per_prompt]
            seed = self.drawing.seed + index
            yield Sample(f"{prompt!r}, seed {seed}", prompt, seed=seed)


def open_source(
    spec: str | Path,
    *,
    image: str | None = None,
    caption: str | None = None,
    split: str | None = None,
    drawing: Drawing | None = None,
    captioned: bool = True,
) -> Source:
    """Find out what a string or path stands for, and open it.

    Args:
        spec: a folder of pictures, or of clips, with NAME.txt beside them or a metadata file; a
            folder with tables, or of `save_to_disk`; a table (.parquet, .arrow);
            `hf:NAME`, a data set of the Hub; tar shards (a folder of them, one, or a pattern such
            as `data-{000..012}.tar`); a .txt file with one prompt per line.
        image: column of the pictures, or their extension in shards; by default it is found.
        caption: column of the captions, or their extension or JSON field in shards.
        split: of a data set with several.
        drawing: how prompts are drawn.
        captioned: whether captions are needed. Without, samples have none.

    Raises:
        ConvFusionError: it does not exist, is empty or cannot be read, a column is not found, or
            something is asked for that such a source does not have.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return open_rows(spec, None, image, caption, split, captioned)
    if re.match(r"[a-z][a-z0-9+.-]*://|pipe:", spec):
        raise ConvFusionError(f"{spec} is not on this machine: copy it to disk, or write hf:NAME")
    path = Path(spec)
    if os.path.isfile(path / "cache.json"):
        raise ConvFusionError(f"{spec} is a cache already: it needs no source")
    if shards := _find_shards(spec):
        _check_absent(spec, "tar shards have", split=split)
        return Shards(spec, tuple(shards), image, caption, captioned)
    if os.path.isdir(path):
        return _open_folder(spec, image, caption, split, captioned)
    if not os.path.isfile(path):
        raise ConvFusionError(f"{spec} is no plain file and no folder")
    if path.suffix.lower() == ".txt":
        _check_absent(spec, "prompts have", image=image, caption=caption, split=split)
        return Prompts(spec, tuple(read_prompts(path)), drawing or Drawing())
    if path.suffix.lower() not in TABLES:
        raise ConvFusionError(f"{spec} is no data: it should be a {', '.join(TABLES)} or .tar")
    return open_rows(spec, [spec], image, caption, split, captioned)


def _find_shards(spec: str) -> list[Path]:
    """The tar shards that a string stands for.

    Raises:
        ConvFusionError: nothing of that name exists.
    """
    path = Path(spec)
    if os.path.isdir(path):
        files = sorted(path.glob("*.tar"))
        return [file for file in files if not (file.name.startswith(".") or file.is_dir())]
    if os.path.exists(path):
        return [path] if path.suffix == ".tar" else []
    if "{" not in spec:
        raise ConvFusionError(f"{spec} does not exist; a data set of the Hub is called hf:{spec}")
    shards = [Path(name) for name in expand_braces(spec)]
    if missing := [shard for shard in shards if not os.path.isfile(shard)]:
        raise ConvFusionError(f"{missing[0]} does not exist ({len(missing)} of {spec} do not)")
    return shards


def _open_folder(
    spec: str, image: str | None, caption: str | None, split: str | None, captioned: bool
) -> Source:
    folder = Path(spec)
    if any((folder / name).is_file() for name in SAVED):
        return open_rows(spec, None, image, caption, split, captioned)
    listing = list_files(folder)
    if captioned and (clips := find_clips(folder, listing)):
        _check_absent(spec, "a folder of clips has", split=split)
        return open_clips(spec, listing, clips, image, caption)
    if any(map(is_picture, listing.files)):
        _check_absent(spec, "a folder of pictures has", split=split)
        return open_pictures(spec, listing, image, caption, captioned)
    tables = [name for name in listing.files if Path(name).suffix.lower() in TABLES]
    for name, problem in listing.unread:
        raise ConvFusionError(f"{folder / name} cannot be read: {problem}")
    if not tables:
        raise ConvFusionError(f"{spec} has no pictures ({', '.join(PICTURES)}), tables or shards")
    files = [str(folder / name) for name in tables]
    return open_rows(spec, files, image, caption, split, captioned)


def _check_absent(spec: str, have: str, **given: str | None) -> None:
    """Refuse what is asked of a source that has no such thing."""
    for name, value in given.items():
        if value is not None:
            raise ConvFusionError(f"{spec} has no {name} {value!r}: {have} none, leave it out")


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{x,y}` → x, y."""
    match = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if first is not None and not 0 <= int(last) - int(first) < BRACES:
        raise ConvFusionError(f"{match[0]} should count up, and to no more than {BRACES} names")
    parts = (
        words.split(",")
        if first is None
        else [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    )
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [rest for part in parts for rest in expand_braces(head + part + tail)]
