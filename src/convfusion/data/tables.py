"""Pictures with captions from Hugging Face `datasets`: the Hub, local tables, saved data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convfusion.data.contents import digest_of_rows
from convfusion.data.samples import CAPTION_NAMES, Ranges, Sample, make_sample
from convfusion.errors import ConvFusionError
from convfusion.extras import check_installed

IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` writes
TABLES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
}
BUILDERS = {*TABLES.values(), "imagefolder", "webdataset"}  # which read data and nothing else


@dataclass(frozen=True)
class Rows(Ranges):
    """Rows of a Hugging Face `datasets.Dataset` whose pictures are not decoded.

    Attributes:
        spec: as the user gave it.
        data: with two columns.
        image: name of the column of pictures.
        caption: name of the column of captions; numbers there are class numbers.
    """

    spec: str
    data: Any
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.data)

    def description(self) -> dict[str, Any]:
        found = {"image": self.image, "caption": self.caption}
        contents = digest_of_rows(self.data, self.image, self.caption)
        return {"kind": "datasets", "samples": len(self), "contents": contents, **found}

    def read(self, unit: int) -> Iterator[Sample]:
        for index in self.within(unit):
            row = self.data[index]
            picture = row[self.image]
            if isinstance(picture, dict):
                path = picture.get("path")
                picture = picture.get("bytes") or (Path(path) if path else None)
            yield make_sample(f"row {index}", picture, row[self.caption])


def open_rows(spec: str, image: str | None, caption: str | None, split: str | None) -> Rows:
    check_installed("datasets")
    import datasets

    try:
        data = _load(spec)
    except ConvFusionError:
        raise
    except Exception as error:  # of many libraries below
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ConvFusionError(f"{spec} cannot be read as a data set: {told}") from None
    if isinstance(data, datasets.DatasetDict):
        wanted = split or (next(iter(data)) if len(data) == 1 else "train")
        if wanted not in data:
            raise ConvFusionError(f"{spec} has no split {wanted!r}: it has {', '.join(data)}")
        data = data[wanted]
    kinds = {
        name: isinstance(kind, (datasets.Image, dict)) or getattr(kind, "dtype", "") == "binary"
        for name, kind in data.features.items()
    }
    image = _column(spec, image, IMAGE_NAMES, [n for n in kinds if kinds[n]], "pictures", kinds)
    caption = _column(
        spec, caption, CAPTION_NAMES, [n for n in kinds if not kinds[n]], "captions", kinds
    )
    data = data.with_format(None).select_columns(list(dict.fromkeys([image, caption])))
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    if not len(data):
        raise ConvFusionError(f"{spec} is empty")
    return Rows(spec, data, image, caption)


def _load(spec: str) -> Any:
    import datasets

    path = Path(spec)
    if spec.startswith("hf:"):
        builder = datasets.load_dataset_builder(spec[3:])
        if builder.name not in BUILDERS:
            raise ConvFusionError(f"{spec} is of the kind {builder.name}, which is not read here")
        builder.download_and_prepare()
        return builder.as_dataset()
    if path.is_file():
        return datasets.load_dataset(TABLES[path.suffix.lower()], data_files=spec)
    if any((path / name).is_file() for name in SAVED):
        return datasets.load_from_disk(spec)
    if any((path / name).is_file() for name in METADATA):
        return datasets.load_dataset("imagefolder", data_dir=spec)
    kind, files = next(
        (TABLES[suffix], found)
        for suffix in TABLES
        if (found := sorted(str(file) for file in path.rglob(f"*{suffix}")))
    )
    return datasets.load_dataset(kind, data_files=files)


def _column(
    spec: str,
    asked: str | None,
    usual: tuple[str, ...],
    fitting: list[str],
    what: str,
    columns: Iterable[str],
) -> str:
    """The column asked for, or the first of the usual names among those that fit."""
    found = asked or next((name for name in usual if name in fitting), None)
    if found is None or found not in columns:
        missing = "no column that is known to hold" if found is None else f"no column {found!r} of"
        raise ConvFusionError(f"{spec} has {missing} {what}: name one of {', '.join(columns)}")
    return found
