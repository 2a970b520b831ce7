"""Pictures with captions from Hugging Face `datasets`: the Hub, local tables, saved data sets."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convfusion.data.contents import digest_rows
from convfusion.data.samples import CAPTION_NAMES, Ranges, Sample, make_sample
from convfusion.errors import ConvFusionError, first_line
from convfusion.imports import check_installed

IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bmp")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` writes
TABLES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
}
BUILDERS = {*TABLES.values(), "imagefolder", "webdataset"}  # which read data and nothing else
CAPTIONS = ("string", "large_string", "string_view", "int", "uint", "binary", "large_binary")


@dataclass(frozen=True)
class Rows(Ranges):
    """Rows of a Hugging Face `datasets.Dataset` whose pictures are not decoded.

    Attributes:
        spec: as the user gave it.
        data: with the columns below.
        images: names of the columns of pictures; the first that has one counts.
        captions: likewise; numbers there are class numbers.
        captioned: whether captions are needed.
    """

    spec: str
    data: Any
    images: tuple[str, ...]
    captions: tuple[str, ...]
    captioned: bool = True

    def __len__(self) -> int:
        return len(self.data)

    def describe(self) -> dict[str, Any]:
        columns = {"images": list(self.images), "captions": list(self.captions)}
        contents = digest_rows(self.data, self.images, self.captions)
        return {"kind": "datasets", "samples": len(self), "contents": contents, **columns}

    def read(self, unit: int) -> Iterator[Sample]:
        for index in self.list_indices(unit):
            name = f"row {index}"
            try:
                row = self.data[index]
            except Exception:  # of many libraries below, as for text that is not in UTF-8
                yield Sample(name, problem="damaged row")
                continue
            picture = _find_picture([row[name] for name in self.images])
            yield make_sample(name, picture, [row[name] for name in self.captions], self.captioned)


def open_rows(
    spec: str,
    files: Sequence[str] | None,
    image: str | None,
    caption: str | None,
    split: str | None,
    captioned: bool = True,
) -> Rows:
    """Open a data set, and find its columns.

    Args:
        spec: `hf:NAME`, a folder of `save_to_disk`, or what the user called the files.
        files: tables of one format, or None for a data set.
        image: column of the pictures, or None for those of `IMAGE_NAMES`.
        caption: column of the captions, or None for those of `CAPTION_NAMES`.
        split: of several; by default `train`.
        captioned: whether captions are needed.

    Raises:
        ConvFusionError: it cannot be read or is empty, or a column is not found, or holds
            something else.
    """
    check_installed("datasets")
    import datasets

    try:
        data = _load(spec, files)
    except ConvFusionError:
        raise
    except Exception as error:  # of many libraries below
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = first_line(cause) or type(cause).__name__
        raise ConvFusionError(f"{spec} cannot be read as a data set: {reason}") from None
    if isinstance(data, datasets.DatasetDict):
        wanted = split or (next(iter(data)) if len(data) == 1 else "train")
        if wanted not in data:
            raise ConvFusionError(f"{spec} has no split {wanted!r}: it has {', '.join(data)}")
        data = data[wanted]
    elif split is not None:
        raise ConvFusionError(f"{spec} has no split {split!r}: it has one part only, leave it out")
    kinds = data.features
    images = _choose_columns(spec, image, IMAGE_NAMES, _holds_pictures, "pictures", kinds)
    captions: tuple[str, ...] = ()
    if captioned:
        captions = _choose_columns(spec, caption, CAPTION_NAMES, _holds_captions, "captions", kinds)
    data = data.with_format(None).select_columns(list(dict.fromkeys([*images, *captions])))
    for name in images:
        if isinstance(data.features[name], datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    if not len(data):
        raise ConvFusionError(f"{spec} is empty")
    return Rows(spec, data, images, captions, captioned)


def _load(spec: str, files: Sequence[str] | None) -> Any:
    import datasets

    if spec.startswith("hf:"):
        builder = datasets.load_dataset_builder(spec[3:])
        if builder.name not in BUILDERS:
            raise ConvFusionError(f"{spec} is of the kind {builder.name}, which is not read here")
        builder.download_and_prepare()
        return builder.as_dataset()
    if files is None:
        return datasets.load_from_disk(spec)
    suffixes = sorted({Path(name).suffix.lower() for name in files})
    if len(suffixes) > 1:
        raise ConvFusionError(f"{spec} has tables in {' and '.join(suffixes)}: name one of them")
    kind = TABLES[suffixes[0]]
    return datasets.load_dataset(kind, data_files=[glob.escape(name) for name in files])


def _choose_columns(
    spec: str,
    asked: str | None,
    usual: tuple[str, ...],
    fits: Callable[[Any], bool],
    what: str,
    kinds: Mapping[str, Any],
) -> tuple[str, ...]:
    """The column asked for, or those of the usual names that fit."""
    named = [asked] if asked else [name for name in usual if name in kinds]
    columns = tuple(name for name in named if name in kinds and fits(kinds[name]))
    if columns:
        return columns
    if named and named[0] in kinds:
        held = f"a column {named[0]!r} that holds {_name_kind(kinds[named[0]])}, not {what}"
        if what == "pictures":
            held += " as bytes (paths, addresses and base64 are not read)"
        raise ConvFusionError(f"{spec} has {held}: name one of {', '.join(kinds)}")
    missing = f"no column {asked!r} of" if asked else "no column that is known to hold"
    raise ConvFusionError(f"{spec} has {missing} {what}: name one of {', '.join(kinds)}")


def _name_kind(kind: Any) -> str:
    """A word for the kind of a column: `string`, `list`, …"""
    return str(getattr(kind, "dtype", type(kind).__name__)).lower()


def _get_inner(kind: Any) -> Any:
    """The kind of a list's entries, or None."""
    return kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)


def _holds_pictures(kind: Any) -> bool:
    import datasets

    if isinstance(kind, dict):
        return "bytes" in kind
    inner = _get_inner(kind)
    return (
        isinstance(kind, datasets.Image)
        or "binary" in _name_kind(kind)
        or (inner is not None and _holds_pictures(inner))
    )


def _holds_captions(kind: Any) -> bool:
    import datasets

    if isinstance(kind, (dict, datasets.ClassLabel)):
        return "bytes" not in kind if isinstance(kind, dict) else True
    inner = _get_inner(kind)
    return _name_kind(kind).startswith(CAPTIONS) or (inner is not None and _holds_captions(inner))


def _find_picture(value: Any) -> bytes | Path | None:
    """A picture as it is encoded, or its file: of a list the first."""
    if isinstance(value, list):
        return next((part for part in map(_find_picture, value) if part is not None), None)
    if isinstance(value, dict):
        path = value.get("path")
        return value.get("bytes") or (Path(path) if path else None)
    return value if isinstance(value, bytes) and value else None
