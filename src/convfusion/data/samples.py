"""Samples of a data set before they are worked on, and what sources of them have in common.

Nothing that a source holds is unpickled or executed: captions are read as text, pictures as bytes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from convfusion.errors import ConvFusionError
from convfusion.text import decode_text, is_text, strip_text

CHUNK = 64  # consecutive samples that are worked on, and kept, together
NESTED = 8  # lists in lists that a caption is looked for in
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "txt")


@dataclass(frozen=True)
class Sample:
    """One sample as its source holds it.

    Attributes:
        name: what a report calls it.
        caption: stripped.
        picture: an encoded picture or its file; None where the teacher draws it.
        seed: of the drawing.
        problem: why it cannot be used, or ''.
    """

    name: str
    caption: str = ""
    picture: bytes | Path | None = None
    seed: int = 0
    problem: str = ""


class Source(Protocol):
    """Samples in a fixed order, in units that workers can read apart from each other."""

    @property
    def spec(self) -> str:
        """What the user called it."""
        ...

    @property
    def units(self) -> int: ...

    @property
    def total(self) -> int | None:
        """Samples in all, if that is known without reading them."""
        ...

    def describe(self) -> dict[str, Any]:
        """What tells it from another source, for JSON."""
        ...

    def read(self, unit: int) -> Iterator[Sample]:
        """The samples of one unit, in order."""
        ...


class Ranges(ABC):
    """Units of a source whose samples can be counted: one chunk each."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def units(self) -> int:
        return -(-len(self) // CHUNK)

    @property
    def total(self) -> int | None:
        return len(self)

    def list_indices(self, unit: int) -> range:
        return range(unit * CHUNK, min((unit + 1) * CHUNK, len(self)))


def make_sample(
    name: str, picture: bytes | Path | None, caption: Any, captioned: bool = True
) -> Sample:
    """A sample with its caption as text, or with what is wrong with it.

    Args:
        name: what a report calls it.
        picture: encoded, or its file.
        caption: see `find_caption`.
        captioned: whether a caption is needed.
    """
    if picture is None:
        return Sample(name, problem="no picture")
    if not captioned:
        return Sample(name, picture=picture)
    try:
        text = find_caption(caption)
    except ConvFusionError:
        return Sample(name, problem="damaged caption")
    return Sample(name, text, picture) if text else Sample(name, problem="no caption")


def find_caption(value: Any, depth: int = NESTED) -> str:
    """The text of a caption in any of its usual forms, or '' if there is none.

    Args:
        value: text, encoded text, the number of a class, the error that reading it raised, a list
            of those, of which the first with text in it is taken, or a dictionary with a caption
            under one of `CAPTION_NAMES`.
        depth: of lists and dictionaries within each other.

    Raises:
        ConvFusionError: there is none that is sound, and one that is damaged.
    """
    if isinstance(value, ConvFusionError):
        raise value
    if isinstance(value, bytes):
        value = decode_text(value, "the caption")
    if isinstance(value, str):
        if not is_text(value):
            raise ConvFusionError("the caption is not valid Unicode")
        return strip_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, dict):
        value = [value.get(name) for name in (*CAPTION_NAMES, "raw")]
    if not isinstance(value, list) or not depth:
        return ""
    error: ConvFusionError | None = None
    for part in value:
        try:
            if text := find_caption(part, depth - 1):
                return text
        except ConvFusionError as damage:
            error = error or damage
    if error:
        raise error
    return ""


def digest_names(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]
