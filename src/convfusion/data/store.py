"""The files of a latent cache, and what reads them back for training.

    cache.json               what it rests on, what is in it, what was skipped
    empty.safetensors        the conditioning of the empty caption, for each size
    chunks/UNIT-CHUNK.json   captions of up to 64 consecutive samples of the source, and what failed
    chunks/UNIT-CHUNK.safetensors   their `WxH/latents` and `WxH/<conditioning>`,
                                    of clips `WxHxFRAMES/…`

The record of a chunk is written after its tensors, so a chunk that has one is whole. Words of zeros
at the end of its texts are left out, and put back as they are taken. Only JSON and safetensors are
read: a cache from outside cannot run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from convfusion.data.buckets import Extent
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.files import read_json, read_tensors, write_text
from convfusion.text import LIST_BYTES

FORMAT = 2
MANIFEST, EMPTY, CHUNKS = "cache.json", "empty.safetensors", "chunks"
HANDLES = 32  # files that are open at once


class LatentCache:
    """A complete cache, opened for training. Its tensors stay on disk until they are taken.

    It can be read in the workers of a data loader.

    Args:
        folder: that `build_cache` wrote.

    Attributes:
        captions: of every sample.
        groups: indices of the samples, those of one size together.
        sizes: (height, width) in pixels of each group; of clips (frames, height, width).
        skipped: by reason, {"count": …, "names": the first 20}.
        manifest: what `cache.json` says.

    Raises:
        ConvFusionError: there is no cache, or it is not complete.
        CheckpointError: it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, complete=True)
        self.captions: Sequence[str] = []
        self.groups: Sequence[Sequence[int]] = []
        try:
            self.skipped: dict[str, dict[str, Any]] = self.manifest["skipped"]
            self.buckets = len(self.manifest["buckets"]) > 1
            self._names = list(self.manifest["sizes"])
            self.sizes = [_parse_size(name) for name in self._names]
            self._dtypes = {
                key: None if name is None else _parse_dtype(name)
                for key, name in self.manifest["conditioning"].items()
            }
            self._empty = read_tensors(self.folder / EMPTY)
            self._read_index()
        except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from None
        self._open = lru_cache(HANDLES)(self._open_file)

    def _read_index(self) -> None:
        wanted = {f"{n}/{key}" for n in self._names for key, dtype in self._dtypes.items() if dtype}
        if not wanted <= self._empty.keys():
            raise ValueError(f"{EMPTY} lacks tensors")
        captions: list[str] = []
        where: list[tuple[int, int, int, int]] = []
        self._files: list[str] = []
        for path in sorted((self.folder / CHUNKS).glob("*.json")):
            record = read_object(path)
            for name, samples in record["sizes"].items():
                rows = samples["rows"]
                self._check_file(path.with_suffix(".safetensors"), name, rows)
                file, kind = len(self._files), self._names.index(name)
                where += [(file, kind, row, line) for row, line in enumerate(rows)]
                captions += samples["captions"]
            self._files.append(path.stem)
        self._where = np.array(where, dtype=np.int64).reshape(-1, 4)
        kinds = self._where[:, 1]
        groups = [np.flatnonzero(kinds == kind).tolist() for kind in range(len(self._names))]
        self.captions, self.groups = captions, groups
        counts = [len(captions), len(where), len(self._files), *map(len, groups)]
        total, sizes = self.manifest["samples"], self.manifest["sizes"]
        if counts != [total, total, self.manifest["chunks"], *sizes.values()]:
            raise ValueError("samples or chunks are missing")

    def _check_file(self, path: Path, name: str, rows: list[int]) -> None:
        """Raise a ValueError unless a file has what its record says; nothing of it is read."""
        tensors = {"latents": len(rows)}
        tensors |= {key: max(rows) + 1 for key, dtype in self._dtypes.items() if dtype}
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            for key, count in tensors.items():
                full = f"{name}/{key}"
                if full not in held or file.get_slice(full).get_shape()[0] != count:
                    raise ValueError(f"{path.name} lacks some of {full}")

    def _open_file(self, file: int) -> Any:
        path = self.folder / CHUNKS / f"{self._files[file]}.safetensors"
        return safe_open(path, framework="pt")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(HANDLES)(self._open_file)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def largest(self) -> Extent:
        """The size with the most pixels, over all frames."""
        return max(self.sizes, key=math.prod)

    def take(
        self, indices: Sequence[int], dropped: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        latents: list[Tensor] = []
        rows_of: dict[str, list[Tensor]] = {key: [] for key, dtype in self._dtypes.items() if dtype}
        for index, drop in zip(indices, dropped, strict=True):
            number, kind, row, line = self._where[index].tolist()
            file, name = self._open(number), self._names[kind]
            latents.append(file.get_slice(f"{name}/latents")[row : row + 1].float())
            for key, rows in rows_of.items():
                full = f"{name}/{key}"
                own = None if drop else file.get_slice(full)[line : line + 1]
                whole = self._empty[full]
                row = whole if own is None else pad_like(own, whole)
                rows.append(row.to(self._dtypes[key]))
        conditioning = {
            key: torch.cat(rows_of[key]) if dtype else None for key, dtype in self._dtypes.items()
        }
        return torch.cat(latents), conditioning


def pad_like(text: Tensor, whole: Tensor) -> Tensor:
    """Text [1, w, C] with zeros behind its words, to as many as another has; others as they are."""
    if text.shape == whole.shape:
        return text
    return nn.functional.pad(text, (0, 0, 0, whole.shape[1] - text.shape[1]))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path, *, complete: bool = False) -> dict[str, Any]:
    """What `cache.json` says.

    Raises:
        ConvFusionError: there is none, or, if that is asked for, the cache is not complete.
        CheckpointError: it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise ConvFusionError(f"{folder} is no cache: it has no {MANIFEST}")
    manifest = read_object(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a cache of format {FORMAT}: build it anew")
    if complete and not manifest.get("complete"):
        raise ConvFusionError(
            f"{folder} is not complete: build it with the same source and settings again, "
            "and it goes on where it stopped"
        )
    return manifest


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a cache holds.

    Raises:
        CheckpointError: it is missing or damaged, or holds something else.
    """
    content = read_json(path, LIST_BYTES)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object")
    return content


def _parse_size(name: str) -> Extent:
    width, height, *frames = map(int, name.split("x"))
    return (*frames, height, width)


def _parse_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype
