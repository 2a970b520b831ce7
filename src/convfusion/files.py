"""Files on disk: written whole or not at all, and read without trust.

What is read is safetensors or JSON, so a file from outside cannot run code. The header of a
safetensors file tells every shape before any tensor is read, and the library behind it refuses
headers that are too long, offsets out of range, tensors that overlap and shapes that overflow.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.folders import unfinished_name, unwritable
from convfusion.text import read_text

if TYPE_CHECKING:
    from PIL import Image

JSON_BYTES = 16 * 2**20  # a manifest of SDXL's 70 sites takes 30 kB
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # dtypes, in the words of safetensors


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says of a tensor; dtype in its own words (`F32`)."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes of a safetensors file by name; the tensors themselves are not read.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with _opened(path) as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        return {
            name: TensorInfo(tuple(each.get_shape()), each.get_dtype())
            for name, each in slices.items()
        }


def read_some(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, each under the name that `names` gives its own."""
    with _opened(path) as file:
        # Copies lie as aligned in memory as fresh tensors do: products round the same.
        return {new: file.get_tensor(name).clone() for name, new in names.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from None


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """The content of a JSON file of at most so many bytes, decoded as `read_text` does.

    Raises:
        CheckpointError: it is missing, too large, no text or no JSON.
    """
    try:
        return json.loads(read_text(path, most))
    except ConvFusionError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from None


def read_notes(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def write_tensors(
    path: Path, tensors: dict[str, Tensor], notes: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file aside, flush it to disk and rename it into place.

    Args:
        path: of the file.
        tensors: by name.
        notes: what its header says beside them, which `read_notes` reads; of several, the order in
            the file is left to chance.

    Returns:
        The SHA-256 of the file, as `file_digest` tells it.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; nothing is left of it.
    """
    with _aside(path) as aside:
        save_file(tensors, aside, metadata=dict(notes or {"format": "pt"}))
        return file_digest(aside)


def write_text(path: Path, text: str) -> None:
    """As `write_tensors`, for text, in UTF-8; a lone surrogate is written as JSON escapes it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """As `write_tensors`, for a table: CSV with a line of the columns, and one of each row."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_tensors`, for the content of any file."""
    with _aside(path) as aside:
        aside.write_bytes(data)


def write_picture(path: Path, image: Image.Image, *, optimize: bool = False) -> None:
    """As `write_tensors`, for a PNG, in RGB or with a palette; `optimize` makes it smaller."""
    buffer = io.BytesIO()
    picture = image if image.mode == "P" else image.convert("RGB")
    picture.save(buffer, "PNG", optimize=optimize)
    write_bytes(path, buffer.getvalue())


def is_whole(path: Path, size: tuple[int, int] | None = None) -> bool:
    """Whether a PNG is there and can be read to its end, and is of a size (width, height)."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            picture.load()
            return size is None or picture.size == size
    except Exception:  # Pillow has many kinds for what is damaged
        return False


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def share_files(folder: Path) -> None:
    """Give all files in a folder the mode that a new file has here; libraries keep some private."""
    probe = folder / unfinished_name()
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read, with the first words of the cause."""
    reason = getattr(error, "strerror", None) or str(error)[:200]  # which names no path again
    return CheckpointError(f"{path} cannot be read: {reason}")


def few(names: Any) -> str:
    """The first three of some names, and how many more there are."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(name[:200] for name in ordered[:3]) + rest


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from None


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of another one once it is on disk.

    Its name is nobody else's, so several processes may write the same file, and the last one
    stays. A link stays too, and leads to what was written. The mode is that of any new file here.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        raise CheckpointError(f"{path} cannot be written: it is no plain file")
    aside = place.with_name(unfinished_name())
    try:
        aside.touch(exist_ok=False)
        mode = stat.S_IMODE(aside.stat().st_mode)
        yield aside
        aside.chmod(mode)  # safetensors puts a file in its place that only its owner may read
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, (OSError, SafetensorError)):
            raise unwritable(path, error) from None
        raise
