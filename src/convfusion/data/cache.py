"""Latents and conditioning of a data set, computed once into a folder and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from convfusion.data.buckets import Extent, Size
from convfusion.data.chunks import Chunk, Encoder, Event, Reader, Ready, format_size, read_events
from convfusion.data.extents import choose_sizes
from convfusion.data.pictures import upcast_vae
from convfusion.data.samples import Source
from convfusion.data.sources import Drawing, Prompts, open_source
from convfusion.data.store import (
    CHUNKS,
    EMPTY,
    FORMAT,
    MANIFEST,
    LatentCache,
    read_manifest,
    read_object,
    write_manifest,
)
from convfusion.errors import ConvFusionError
from convfusion.families import check_captioned, denoiser_of, family_of
from convfusion.files import write_tensors, write_text
from convfusion.fingerprint import differences, identity, module_identity, scheduler_identity
from convfusion.folders import LOCK, is_unfinished, locked, remove_remains
from convfusion.generate import can_guide, check_guidance, check_steps, swapped_denoiser
from convfusion.surgery import attention_teacher, mixers_of

NAMED = 20  # of the skipped samples, for each reason


def open_cache(
    pipe: Any, folder: str | Path, *, size: Size | None = None, frames: int | None = None
) -> LatentCache:
    """Open a cache for training a pipeline, and check that it belongs to it.

    Args:
        pipe: converted or not. A VAE or text encoders that it was loaded without are not checked.
        folder: that `build_cache` wrote.
        size: (height, width) that it must have been built for, if given.
        frames: of the clips that it must have been built for, if given.

    Raises:
        ConvFusionError: there is no complete cache, or it rests on another VAE, other text
            encoders, another family or size.
        CheckpointError: it is damaged.
    """
    manifest = read_manifest(Path(folder), complete=True)
    family = family_of(denoiser_of(pipe)).name
    if manifest.get("family") != family:
        raise ConvFusionError(
            f"{folder} is the cache of a {manifest.get('family')} model, and this is a {family}"
        )
    held = tuple(manifest.get("size", (0, 0)))
    wanted = (*held[:-2], *(size or held[-2:]))
    if frames is not None:
        wanted = (frames, *wanted[-2:])
    if wanted != held:
        raise ConvFusionError(
            f"{folder} was built for {format_size(held)}, not for {format_size(wanted)}"
        )
    if other := differences(manifest.get("rests_on", {}), identity(pipe)):
        raise ConvFusionError(
            f"{folder} was built with another {', another '.join(other)}: build it anew, or train "
            "with the pipeline, in the precision, that it was built with"
        )
    return LatentCache(folder)


@torch.no_grad()
def build_cache(
    pipe: Any,
    source: Source | str | Path,
    folder: str | Path,
    *,
    size: Size | None = None,
    frames: int | None = None,
    buckets: bool = False,
    num_workers: int = 0,
    batch_size: int = 8,
    half: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> LatentCache:
    """Compute latents and conditioning of a source into a folder, or go on with that.

    What was killed goes on at the first chunk that is missing, and ends in the same bits, whatever
    the number of workers.

    Args:
        pipe: whose VAE and text encoders are asked. Prompts are drawn by its own attention, whether
            it is converted or not.
        source: from `open_source`, or what that opens: a folder of pictures or clips, a table, tar
            shards, `hf:NAME` or a file of prompts, which are drawn with the defaults of `Drawing`,
            without guidance where the pipeline has none. A pipeline that draws videos needs clips
            or prompts.
        folder: new, empty, or with an unfinished cache of the same source and settings.
        size: (height, width) of the pictures, by default the pipeline's own.
        frames: of each clip, by default as many as the pipeline's own; for pipelines that draw
            videos. Longer clips are cut after their first frames.
        buckets: choose for each picture among sizes of about this area the one of nearest ratio;
            for each clip also among all, half and a quarter of the frames.
        num_workers: processes that read, decode and resize; 0 does so in this one.
        batch_size: pictures, or captions, that are encoded or drawn at once.
        half: keep numbers in float16, in half the space; latents are rounded by up to 0.05 %.
        on_progress: called with the number of samples done, after each chunk.

    Raises:
        ConvFusionError: a setting is out of range, the folder holds something else, a latent is not
            finite, or nothing of the source can be used.
    """
    folder = Path(folder)
    check_captioned(pipe)
    source = _open(pipe, source)
    sizes = choose_sizes(pipe, source, size, frames, buckets)
    if num_workers < 0 or batch_size < 1:
        raise ConvFusionError("num_workers must be at least 0, and batch_size at least 1")
    drawing = source.drawing if isinstance(source, Prompts) else None
    if drawing is not None:
        check_steps(pipe, drawing.steps)
        check_guidance(pipe, drawing.guidance)
    _check_place(folder)
    encoder = Encoder(pipe, batch_size, half, drawing)
    rests_on = _identify_parts(pipe)  # in the precision that the pipeline was loaded in
    with ExitStack() as stack:
        stack.enter_context(upcast_vae(pipe.vae) if drawing is None else _swap_in_teacher(pipe))
        settings = {"rests_on": rests_on, **_collect_settings(pipe, source, sizes, encoder)}
        if _is_complete(folder, settings):
            return LatentCache(folder)
        stack.enter_context(locked(folder))
        remove_remains(folder, folder / CHUNKS)
        if _is_complete(folder, settings):  # by another process meanwhile
            return LatentCache(folder)
        _begin(folder, settings, encoder, sizes)
        _fill(folder, source, sizes, encoder, num_workers, on_progress or (lambda done: None))
    return LatentCache(folder)


def _collect_settings(
    pipe: Any, source: Source, sizes: list[Extent], encoder: Encoder
) -> dict[str, Any]:
    """What decides the content of a cache beside the identity of the pipeline's parts."""
    settings: dict[str, Any] = {"format": FORMAT, "family": family_of(denoiser_of(pipe)).name}
    if encoder.drawing is not None:
        settings["drawn_by"] = {
            "teacher": module_identity(denoiser_of(pipe)),
            "scheduler": scheduler_identity(pipe.scheduler),
        }
    settings |= {"size": list(sizes[0]), "buckets": [list(size) for size in sizes]}
    settings |= {"batch_size": encoder.batch_size, "half": encoder.half}
    return settings | {"source": source.describe()}


def _fill(
    folder: Path,
    source: Source,
    sizes: list[Extent],
    encoder: Encoder,
    num_workers: int,
    on_progress: Callable[[int], None],
) -> None:
    """Write the chunks that are missing, and close the manifest."""
    records = {parse_key(path): read_object(path) for path in (folder / CHUNKS).glob("*.json")}
    reader = Reader(source, sizes, _list_missing(records, source.units))
    events = read_events(reader, 0 if encoder.drawing else num_workers)
    _encode_events(folder, events, encoder, records, on_progress)
    _finish(folder, source, [records[key] for key in sorted(records)])


def _open(pipe: Any, source: Source | str | Path) -> Source:
    """A source as it is, or the one that a string or path stands for."""
    if not isinstance(source, str | Path):
        return source
    return open_source(source, drawing=Drawing() if can_guide(pipe) else Drawing(guidance=1.0))


def _check_place(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    # A run killed at its very start leaves the manifest aside.
    if not folder.is_dir() or any(
        not is_unfinished(path) and path.name != LOCK for path in folder.iterdir()
    ):
        raise ConvFusionError(f"{folder} exists and is no cache: choose another folder")


def _identify_parts(pipe: Any) -> dict[str, Any]:
    """The identity of all parts that pictures and captions go through.

    Raises:
        ConvFusionError: the pipeline was loaded without its VAE or text encoders.
    """
    parts = identity(pipe)
    for name in family_of(denoiser_of(pipe)).idle_components(pipe):
        parts.pop(name.replace("_", " "), None)
    if missing := [part for part, known in parts.items() if known is None]:
        raise ConvFusionError(f"this pipeline has no {' and no '.join(missing)}: load all of it")
    return parts


@contextmanager
def _swap_in_teacher(pipe: Any) -> Iterator[None]:
    """The pipeline as it was before its conversion."""
    denoiser = denoiser_of(pipe)
    teacher = attention_teacher(denoiser) if mixers_of(denoiser) else denoiser
    with swapped_denoiser(pipe, teacher):
        yield


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a cache with these settings is there and complete.

    Raises:
        ConvFusionError: it was begun with others, and has something already.
    """
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    other = _list_differences(manifest, settings)
    if other and (manifest.get("complete") or any((folder / CHUNKS).glob("*.json"))):
        raise ConvFusionError(
            f"{folder} was begun with another {', another '.join(other)}: go on with what it was "
            "begun with, or choose another folder"
        )
    return not other and bool(manifest.get("complete"))


def _list_differences(manifest: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What differs between a cache and settings, in words."""
    inner = ("rests_on", "drawn_by")
    names = differences(manifest, {k: v for k, v in settings.items() if k not in inner})
    for name in inner:
        names += differences(manifest.get(name, {}), settings.get(name, {}))
    return names


def _begin(folder: Path, settings: dict[str, Any], encoder: Encoder, sizes: list[Extent]) -> None:
    """Begin a cache or go on with one; an empty one that was begun otherwise is begun anew."""
    begun = (folder / MANIFEST).is_file()
    if begun and _list_differences(read_manifest(folder), settings):
        _clear(folder)
        begun = False
    if not begun:
        full = Encoder(encoder.pipe, 1, False, None).encode_captions([""], sizes[0])
        dtypes = {
            key: None if tensor is None else str(tensor.dtype).removeprefix("torch.")
            for key, tensor in full.items()
        }
        write_manifest(folder, {**settings, "conditioning": dtypes, "complete": False})
    (folder / CHUNKS).mkdir(exist_ok=True)
    if not (folder / EMPTY).is_file():
        tensors = {
            f"{format_size(size)}/{key}": tensor
            for size in sizes
            for key, tensor in encoder.encode_captions([""], size).items()
            if tensor is not None
        }
        write_tensors(folder / EMPTY, tensors)


def _list_missing(records: dict[tuple[int, int], Any], units: int) -> list[tuple[int, int]]:
    """Of each unit that is not finished, its number and its first chunk that is missing."""
    todo = []
    for unit in range(units):
        number = 0
        while (unit, number) in records and not records[unit, number]["last"]:
            number += 1
        if (unit, number) not in records:
            todo.append((unit, number))
    return todo


def _encode_events(
    folder: Path,
    events: Iterator[Event],
    encoder: Encoder,
    records: dict[tuple[int, int], dict[str, Any]],
    on_progress: Callable[[int], None],
) -> None:
    """Encode what is read, write each chunk as it ends, and add it to the records."""
    done = sum(record["samples"] for record in records.values())
    on_progress(done)
    chunks: dict[tuple[int, int], Chunk] = {}  # workers take turns, so several are on their way
    for key, event in events:
        chunk = chunks.setdefault(key, Chunk(encoder))
        if isinstance(event, Ready):
            chunk.add(event)
            continue
        records[key] = _write_chunk(folder, key, chunks.pop(key), event)
        done += records[key]["samples"]
        on_progress(done)


def _write_chunk(folder: Path, key: tuple[int, int], chunk: Chunk, last: bool) -> dict[str, Any]:
    tensors, record = chunk.finish(last)
    path = folder / CHUNKS / f"{key[0]:07d}-{key[1]:07d}"
    if tensors:
        write_tensors(path.with_suffix(".safetensors"), tensors)
    write_text(path.with_suffix(".json"), json.dumps(record) + "\n")
    return record


def _finish(folder: Path, source: Source, records: list[dict[str, Any]]) -> None:
    """Count everything, and declare the cache complete."""
    sizes: dict[str, int] = {}
    skipped: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, samples in record["sizes"].items():
            sizes[name] = sizes.get(name, 0) + len(samples["rows"])
        for reason, name in record["skipped"]:
            entry = skipped.setdefault(reason, {"count": 0, "names": []})
            entry["count"] += 1
            entry["names"] = [*entry["names"], name][:NAMED]
    if not sizes:
        _clear(folder)  # there is nothing to go on with
        reasons = ", ".join(f"{entry['count']}× {reason}" for reason, entry in skipped.items())
        raise ConvFusionError(f"nothing of {source.spec} can be used: {reasons or 'it is empty'}")
    counts = {"samples": sum(sizes.values()), "chunks": len(records), "sizes": sizes}
    begun = read_manifest(folder)
    write_manifest(folder, {**begun, **counts, "skipped": skipped, "complete": True})


def _clear(folder: Path) -> None:
    """Remove what makes up a cache from its folder, and nothing that somebody put beside it."""
    for name in (MANIFEST, EMPTY):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHUNKS, ignore_errors=True)


def parse_key(path: Path) -> tuple[int, int]:
    unit, _, number = path.stem.partition("-")
    return int(unit), int(number)
