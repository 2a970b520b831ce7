"""Keeping a large picture within memory: what can be done, chosen before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.families import (
    Denoiser,
    denoiser_of,
    latent_scale,
    list_sites,
    noisy_latents,
    pixel_unit,
    site_grid,
)
from convfusion.families.carrier import GRID
from convfusion.highres.peaks import GIB, decoder_peak, denoiser_peak
from convfusion.highres.vae_tiles import Tiles
from convfusion.patches import replaced_attributes, wrapped_method

Size = tuple[int, int]

# Feed-forward layers in chunks, samples one at a time: from the cheapest in time to the cheapest in
# memory. The two halves of the guidance are two samples.
MEANS = ((False, False), (True, False), (True, True))
TILE_SIDES = (256, 128, 64, 32, 16)  # in latents
CHUNK = 4096  # tokens that a feed-forward layer takes at most, where it takes them in chunks


@dataclass(frozen=True)
class Means:
    """What keeps a picture within memory.

    Attributes:
        gib: the estimated peak of activations, weights not counted.
        chunks: feed-forward layers take their tokens in chunks.
        one_at_a_time: guidance takes two passes of one sample, and not one of two.
        tiles: of the VAE; None decodes in one piece.
    """

    gib: float
    chunks: bool = False
    one_at_a_time: bool = False
    tiles: Tiles | None = None

    def __str__(self) -> str:
        said = [
            "no bound on memory" if math.isnan(self.gib) else f"about {self.gib:.2f} GiB",
            "feed-forward layers in chunks" if self.chunks else "",
            "guidance in two passes" if self.one_at_a_time else "",
            f"VAE in tiles of {self.tiles.side} latents" if self.tiles else "",
        ]
        return ", ".join(part for part in said if part)


def choose_means(pipe: Any, size: Size, memory: float, batch: int) -> Means:
    """The first means in the order of their cost that fit.

    Args:
        pipe: a pipeline.
        size: (height, width) of the picture in pixels.
        memory: GiB for activations; 0 for no bound, and then nothing is estimated.
        batch: samples in one pass of the denoiser.

    Raises:
        ConvFusionError: none fits; the message names the largest size of this shape that does.
    """
    if not memory:
        return Means(math.nan, tiles=default_tiles(pipe, size))
    for name in ("controlnet", "adapter"):
        if getattr(pipe, name, None) is not None:
            raise ConvFusionError(
                f"memory cannot be estimated with a {type(getattr(pipe, name)).__name__} beside "
                "the denoiser: leave the bound on memory out"
            )
    tiles, decoding = _decoding(pipe, size, memory)
    least = math.inf
    for chunks, alone in MEANS:
        least = _denoising(pipe, size, batch, chunks, alone)
        if max(least, decoding) <= memory:
            return Means(max(least, decoding), chunks, alone and batch > 1, tiles)
    fits = _largest(pipe, size, memory, batch, math.sqrt(memory / max(least, decoding)))
    advice = f"the largest of this shape that fits is {fits[1]}×{fits[0]}" if fits else "none fits"
    raise ConvFusionError(
        f"{size[1]}×{size[0]} takes about {max(least, decoding):.3g} GiB of activations at the "
        f"least, and {memory:g} GiB are allowed: {advice}"
    )


def default_tiles(pipe: Any, size: Size) -> Tiles | None:
    """Tiles for a picture that is larger than one tile with its margin."""
    tiles, scale = Tiles(), latent_scale(pipe)
    window = (tiles.side + 2 * tiles.margin) * scale
    return tiles if math.prod(size) > window**2 else None


def _denoising(pipe: Any, size: Size, batch: int, chunks: bool, alone: bool) -> float:
    """GiB of one pass of the denoiser."""
    latents, model = _latents(pipe, size), denoiser_of(pipe)
    with chunked_feed_forward(model, latents) if chunks else nullcontext():
        return denoiser_peak(model, latents, batch=1 if alone else batch)


def _decoding(pipe: Any, size: Size, memory: float) -> tuple[Tiles | None, float]:
    """The largest tiles whose decoding fits, and its GiB; else the smallest. None is one piece."""
    latents = _latents(pipe, size)
    picture = 3 * 3 * math.prod(size) * 4 / GIB  # sum of tiles, their weights, and the result
    tiles, gib = None, decoder_peak(pipe.vae, latents)
    for side in TILE_SIDES:
        window = side + 2 * Tiles().margin
        if gib <= memory or window >= min(latents):
            continue
        tiles, gib = Tiles(side=side), decoder_peak(pipe.vae, (window, window)) + picture
    return tiles, gib


def _largest(pipe: Any, size: Size, memory: float, batch: int, share: float) -> Size | None:
    """The largest size of this shape that fits, tried from a share of its sides downwards."""
    unit = pixel_unit(pipe)
    while True:
        height, width = (math.floor(side * share / unit) * unit for side in size)
        if min(height, width) < unit:
            return None
        decoding = _decoding(pipe, (height, width), memory)[1]
        denoising = _denoising(pipe, (height, width), batch, *MEANS[-1])
        if max(decoding, denoising) <= memory:
            return height, width
        share *= 0.95


def _latents(pipe: Any, size: Size) -> Size:
    scale = latent_scale(pipe)
    return size[0] // scale, size[1] // scale


@contextmanager
def chunked_feed_forward(model: Denoiser, latents: Size) -> Iterator[None]:
    """Let the feed-forward layers of a denoiser take their tokens in chunks, for a while.

    Args:
        model: a denoiser.
        latents: (height, width) of the latents that it will be given.
    """
    blocks = [
        (model.get_submodule(site.block), site_grid(model, site, latents))
        for site in list_sites(model)
    ]
    with ExitStack() as stack:
        for block, grid in blocks:  # as `set_chunk_feed_forward` sets them
            size = chunk_of(math.prod(grid))
            stack.enter_context(replaced_attributes(block, _chunk_size=size, _chunk_dim=1))
        yield


def chunk_of(tokens: int) -> int | None:
    """The largest chunk that divides so many tokens and is not above `CHUNK`; None for one."""
    if tokens <= CHUNK:
        return None
    return next(size for size in range(CHUNK, 0, -1) if tokens % size == 0)


@contextmanager
def one_at_a_time(model: Denoiser) -> Iterator[None]:
    """Let a denoiser work on the samples of a batch one after the other, for a while."""

    def in_turn(forward: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        count = len(noisy_latents(model, args, kwargs))
        outputs = [
            forward(*_sample(args, i, count), **_sample({**kwargs, "return_dict": False}, i, count))
            for i in range(count)
        ]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    with wrapped_method(model, "forward", in_turn):
        yield


def _sample(given: Any, index: int, count: int) -> Any:
    """One sample of nested arguments for a batch; what is no part of the batch stays."""
    if isinstance(given, tuple | list):  # residuals of a control net, pictures of IP-Adapters
        return type(given)(_sample(value, index, count) for value in given)
    if isinstance(given, Mapping):
        return {
            name: value if name == GRID else _sample(value, index, count)
            for name, value in given.items()
        }
    if isinstance(given, Tensor) and given.dim() and len(given) == count:
        return given[index : index + 1]
    return given
