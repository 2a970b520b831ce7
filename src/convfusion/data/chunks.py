"""Chunks of samples: read and resized by workers, then encoded or drawn."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from convfusion.data.buckets import Extent, choose_nearest
from convfusion.data.clips import read_clip
from convfusion.data.latents import join_parts
from convfusion.data.pictures import UnusableError, crop_to_cover, decode_picture, encode_pictures
from convfusion.data.samples import CHUNK, Sample, Source
from convfusion.data.sources import Drawing
from convfusion.data.workers import ignore_interrupts
from convfusion.errors import ConvFusionError
from convfusion.families import (
    denoiser_of,
    encode_conditioning,
    family_of,
    unpack_drawn,
)
from convfusion.families.calls import frames_argument
from convfusion.families.conditioning import flatten_conditioning
from convfusion.families.patches import replaced_attributes
from convfusion.generate import draw_batches, generate


@dataclass(frozen=True)
class Ready:
    """A sample that a worker has read.

    Attributes:
        sample: without its encoded picture.
        size: (height, width) that its picture has now, or will be drawn at; (frames, height, width)
            of a clip.
        pixels: [height, width, 3] in 0…255, [frames, height, width, 3] of a clip, or None.
    """

    sample: Sample
    size: Extent
    pixels: np.ndarray | None = None


Event = tuple[tuple[int, int], Ready | bool]  # a sample of a chunk, or its end: was it the last?


class Reader(IterableDataset[Event]):
    """The samples of a source's units, each chunk closed by whether it is the last of its unit.

    Args:
        source: of the samples.
        sizes: that pictures, or clips, may be brought to.
        todo: of each unit that is not finished, its number and its first chunk to read.
    """

    def __init__(
        self, source: Source, sizes: Sequence[Extent], todo: Sequence[tuple[int, int]]
    ) -> None:
        self.source, self.sizes, self.todo = source, sizes, todo

    def __iter__(self) -> Iterator[Event]:
        worker = get_worker_info()
        mine = self.todo[worker.id :: worker.num_workers] if worker else self.todo
        for unit, first in mine:
            samples = itertools.islice(self.source.read(unit), first * CHUNK, None)
            for number, (part, last) in enumerate(_split_into_chunks(samples), first):
                for sample in part:
                    yield (unit, number), self._prepare(sample)
                yield (unit, number), last

    def _prepare(self, sample: Sample) -> Ready:
        bare = replace(sample, picture=None)
        if sample.problem or sample.picture is None:
            return Ready(bare, self.sizes[0])
        try:
            if isinstance(sample.picture, Path) and len(self.sizes[0]) == 3:
                pixels = fit_clip(sample.picture, self.sizes)
            else:
                pixels = fit_picture(sample.picture, self.sizes)
        except UnusableError as error:
            return Ready(replace(bare, problem=str(error)), self.sizes[0])
        return Ready(bare, pixels.shape[:-1], pixels)


def fit_picture(data: bytes | Path, sizes: Sequence[Extent]) -> np.ndarray:
    """A picture, [height, width, 3] in 0…255, at the (height, width) that is nearest to its own.

    Raises:
        UnusableError: it cannot be read, or is smaller.
    """
    picture = decode_picture(data)
    flat = [(size[-2], size[-1]) for size in sizes]
    return crop_to_cover(picture, choose_nearest(flat, (picture.height, picture.width)))


def fit_clip(path: Path, sizes: Sequence[Extent]) -> np.ndarray:
    """A clip, [frames, height, width, 3] in 0…255, as long as it can be.

    Args:
        path: of the clip.
        sizes: (frames, height, width) to choose from: first the sides, by their ratio.

    Raises:
        UnusableError: it cannot be read, or is smaller, or shorter.
    """
    sides = (sizes[0][1], sizes[0][2])
    if len(sizes) > 1:
        height, width = read_clip(path, 1).shape[1:3]
        sides = choose_nearest([(size[1], size[2]) for size in sizes], (height, width))
    *longer, shortest = sorted((size[0] for size in sizes if size[1:] == sides), reverse=True)
    for frames in longer:
        with suppress(UnusableError):
            return read_clip(path, frames, sides)
    return read_clip(path, shortest, sides)


def read_events(reader: Reader, num_workers: int) -> Iterator[Event]:
    """What a reader reads, in this process or in workers of its own."""
    num_workers = min(num_workers, len(reader.todo))
    ahead = 2 if len(reader.sizes[0]) == 3 else CHUNK // 4  # clips are large
    options: dict[str, Any] = {"prefetch_factor": ahead} if num_workers else {}
    # Arrays come through pipes: tensors would need shared memory, which containers have little of.
    loader = DataLoader(
        reader,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_keep_event,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one
        **options,
    )
    return iter(loader)


@dataclass(frozen=True)
class Encoder:
    """Turns what was read into what the denoiser takes.

    Attributes:
        pipe: of the VAE and the text encoders, or that draws.
        batch_size: of what is done at once.
        half: keep numbers in float16.
        drawing: how the teacher draws, or None for pictures and clips.
    """

    pipe: Any
    batch_size: int
    half: bool
    drawing: Drawing | None

    def find_problem(self, sample: Sample) -> str:
        """Why a sample cannot be used, or ''."""
        if sample.problem:
            return sample.problem
        try:
            family_of(denoiser_of(self.pipe)).check_prompts(self.pipe, [sample.caption])
        except ConvFusionError:
            return "caption is no class of the model"
        return ""

    def encode_latents(self, batch: Sequence[Ready], size: Extent) -> Tensor:
        """Scaled latents [B, C, h, w], or [B, C, t, h, w] of clips, on the CPU.

        Raises:
            ConvFusionError: one is not finite.
        """
        if self.drawing is None:
            pixels = [ready.pixels for ready in batch if ready.pixels is not None]
            latents = encode_pictures(self.pipe.vae, np.stack(pixels))
        else:
            latents = draw_latents(self.pipe, [ready.sample for ready in batch], size, self.drawing)
        latents = self._store_dtype(latents)
        for ready, latent in zip(batch, latents, strict=True):
            if not latent.isfinite().all():
                raise ConvFusionError(
                    f"the latent of {ready.sample.name} is not finite: load the model in float32"
                )
        return latents

    def encode_captions(self, captions: Sequence[str], size: Extent) -> dict[str, Tensor | None]:
        """What the denoiser takes for each caption, by flat name, as it is kept.

        Raises:
            ConvFusionError: some of it is not finite.
        """
        sides = (size[-2], size[-1])
        parts = [
            flatten_conditioning(
                encode_conditioning(self.pipe, list(captions[i : i + self.batch_size]), sides)
            )
            for i in range(0, len(captions), self.batch_size)
        ]
        tensors = {key: join_parts([part[key] for part in parts]) for key in parts[0]}
        kept = {key: None if t is None else self._store_dtype(t) for key, t in tensors.items()}
        for key, tensor in kept.items():
            if tensor is not None and not tensor.isfinite().all():
                raise ConvFusionError(
                    f"{key} of {captions[0]!r} or a caption after it is not finite: "
                    "load the model in float32"
                )
        return kept

    def _store_dtype(self, tensor: Tensor) -> Tensor:
        tensor = tensor.half() if self.half and tensor.is_floating_point() else tensor
        return tensor.contiguous()


class Chunk:
    """One chunk on its way; pictures are encoded as soon as a batch of one size is full."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.samples = 0
        self.skipped: list[tuple[str, str]] = []
        self.captions: dict[Extent, list[str]] = defaultdict(list)
        self._waiting: dict[Extent, list[Ready]] = defaultdict(list)
        self._latents: dict[Extent, list[Tensor]] = defaultdict(list)

    def add(self, ready: Ready) -> None:
        self.samples += 1
        if problem := self.encoder.find_problem(ready.sample):
            self.skipped.append((problem, ready.sample.name))
            return
        self.captions[ready.size].append(ready.sample.caption)
        self._waiting[ready.size].append(ready)
        if len(self._waiting[ready.size]) == self.encoder.batch_size:
            self._encode(ready.size)

    def finish(self, last: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors to keep, and the record of them for JSON."""
        tensors: dict[str, Tensor] = {}
        sizes = {}
        for size, captions in self.captions.items():
            self._encode(size)
            name = format_size(size)
            tensors[f"{name}/latents"] = torch.cat(self._latents[size])
            texts = list(dict.fromkeys(captions))  # each encoded once
            for key, tensor in self.encoder.encode_captions(texts, size).items():
                if tensor is not None:
                    tensors[f"{name}/{key}"] = drop_padding(tensor)
            sizes[name] = {
                "captions": captions,
                "rows": [texts.index(caption) for caption in captions],
            }
        record = {
            "samples": self.samples,
            "last": last,
            "sizes": sizes,
            "skipped": self.skipped,
        }
        return tensors, record

    def _encode(self, size: Extent) -> None:
        if waiting := self._waiting.pop(size, None):
            self._latents[size].append(self.encoder.encode_latents(waiting, size))


def drop_padding(tensor: Tensor) -> Tensor:
    """Text [B, W, C] without the words behind the last one that is not zero in some sample.

    Wan's texts are zeros beyond their words, of 512 words that would fill most of a cache.
    """
    if tensor.dim() != 3:
        return tensor
    filled = tensor.flatten(2).any(dim=2).any(dim=0).nonzero()
    return tensor[:, : int(filled.max()) + 1].contiguous() if len(filled) else tensor


@torch.no_grad()
def draw_latents(pipe: Any, samples: Sequence[Sample], size: Extent, drawing: Drawing) -> Tensor:
    """Latents that a pipeline draws of prompts, each from its seed, on the CPU.

    They are [B, C, h, w], or [B, C, t, h, w] of videos, whose size is (frames, height, width).
    """
    if len(size) == 3:
        return _draw_videos(pipe, samples, size, drawing)
    options: dict[str, Any] = {
        "seeds": [sample.seed for sample in samples],
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "batch_size": len(samples),
        "progress": False,
    }
    prompts = [sample.caption for sample in samples]
    if family_of(denoiser_of(pipe)).gives_latents:
        options |= {"size": size, "output_type": "latent"}
        drawn: list[Any] = generate(pipe, prompts, **options)
        return unpack_drawn(pipe, torch.stack(drawn), (size[0], size[1])).float().cpu()
    with _collect_latents(pipe.vae) as latents:  # it gives pictures only
        generate(pipe, prompts, output_type="pt", **options)
    return torch.cat(latents).float().cpu() * pipe.vae.config.scaling_factor


def _draw_videos(pipe: Any, samples: Sequence[Sample], size: Extent, drawing: Drawing) -> Tensor:
    frames, height, width = size
    prompts, seeds = [each.caption for each in samples], [each.seed for each in samples]
    options = {
        "num_inference_steps": drawing.steps,
        "guidance_scale": drawing.guidance,
        "output_type": "latent",
        str(frames_argument(pipe)): frames,
    }
    drawn = draw_batches(pipe, prompts, seeds, (height, width), len(prompts), False, options)
    latents = torch.cat([batch.frames for batch in drawn])
    return unpack_drawn(pipe, latents, (height, width), frames).float().cpu()


@contextmanager
def _collect_latents(vae: Any) -> Iterator[list[Tensor]]:
    """Collect what a VAE is asked to decode, and do not decode it."""
    asked: list[Tensor] = []

    def decode(latents: Tensor) -> SimpleNamespace:
        asked.append(latents)
        return SimpleNamespace(sample=latents)

    with replaced_attributes(vae, decode=decode):
        yield asked


def format_size(size: Extent) -> str:
    """(height, width) as the command line writes it, with the frames of a clip behind it."""
    *frames, height, width = size
    return "x".join(map(str, (width, height, *frames)))


def _split_into_chunks(samples: Iterable[Sample]) -> Iterator[tuple[list[Sample], bool]]:
    """Chunks, each with whether it is the last; one empty chunk if there is nothing."""
    rest = iter(samples)
    part = list(itertools.islice(rest, CHUNK))
    while True:
        following = list(itertools.islice(rest, CHUNK))
        yield part, not following
        if not following:
            return
        part = following


def _keep_event(event: Any) -> Any:
    return event
