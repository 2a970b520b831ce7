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

CHUNK = 64  # consecutive samples that are worked on, and kept, together
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

    def description(self) -> dict[str, Any]:
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

    def within(self, unit: int) -> range:
        return range(unit * CHUNK, min((unit + 1) * CHUNK, len(self)))


def make_sample(name: str, picture: bytes | Path | None, caption: Any) -> Sample:
    """A sample with its caption as text, or with what is wrong with it."""
    if isinstance(caption, list):  # several of one picture, as in COCO
        caption = next((each for each in caption if each), None)
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Sample(name, problem="damaged caption")
    text = str(caption).strip() if isinstance(caption, (str, int)) else ""
    if picture is None:
        return Sample(name, problem="no picture")
    return Sample(name, text, picture) if text else Sample(name, problem="no caption")


def digest_of(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
