"""Keeping a large picture within memory: what can be done, chosen before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
from convfusion.families.patches import replaced_attributes, wrapped_method
from convfusion.highres.peaks import GIB, estimate_decoder_peak, estimate_denoiser_peak
from convfusion.highres.vae_tiles import VaeTiles

Size = tuple[int, int]

# Feed-forward layers in chunks, samples one at a time: from the cheapest in time to the cheapest in
# memory. The two halves of the guidance are two samples.
SAVINGS = ((False, False), (True, False), (True, True))
TILE_SIDES = (256, 128, 64, 32, 16)  # in latents
CHUNK = 4096  # tokens that a feed-forward layer takes at most, where it takes them in chunks


@dataclass(frozen=True)
class MemorySavings:
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
    tiles: VaeTiles | None = None

    def __str__(self) -> str:
        parts = [
            "no bound on memory" if math.isnan(self.gib) else f"about {self.gib:.2f} GiB",
            "feed-forward layers in chunks" if self.chunks else "",
            "guidance in two passes" if self.one_at_a_time else "",
            f"VAE in tiles of {self.tiles.side} latents" if self.tiles else "",
        ]
        return ", ".join(part for part in parts if part)


def choose_savings(pipe: Any, size: Size, memory: float, batch: int) -> MemorySavings:
    """The cheapest savings with which a picture fits into memory.

    Args:
        pipe: a pipeline.
        size: (height, width) of the picture in pixels.
        memory: GiB for activations; 0 for no bound, and then nothing is estimated.
        batch: samples in one pass of the denoiser.

    Raises:
        ConvFusionError: none will do; the message names the largest size of this shape that does.
    """
    if not memory:
        return MemorySavings(math.nan, tiles=choose_default_tiles(pipe, size))
    for name in ("controlnet", "adapter"):
        if getattr(pipe, name, None) is not None:
            raise ConvFusionError(
                f"memory cannot be estimated with a {type(getattr(pipe, name)).__name__} beside "
                "the denoiser: leave the bound on memory out"
            )
    tiles, decoding = _estimate_decoding(pipe, size, memory)
    least = math.inf
    for chunks, alone in SAVINGS:
        least = _estimate_denoising(pipe, size, batch, chunks, alone)
        if max(least, decoding) <= memory:
            return MemorySavings(max(least, decoding), chunks, alone and batch > 1, tiles)
    fits = _find_largest(pipe, size, memory, batch, math.sqrt(memory / max(least, decoding)))
    advice = f"the largest of this shape that fits is {fits[1]}×{fits[0]}" if fits else "none fits"
    raise ConvFusionError(
        f"{size[1]}×{size[0]} takes about {max(least, decoding):.3g} GiB of activations at the "
        f"least, and {memory:g} GiB are allowed: {advice}"
    )


def choose_default_tiles(pipe: Any, size: Size) -> VaeTiles | None:
    """Tiles for a picture that is larger than one tile with its margin."""
    tiles, scale = VaeTiles(), latent_scale(pipe)
    window = (tiles.side + 2 * tiles.margin) * scale
    return tiles if math.prod(size) > window**2 else None


def _estimate_denoising(pipe: Any, size: Size, batch: int, chunks: bool, alone: bool) -> float:
    """GiB of one pass of the denoiser."""
    latents, model = _count_latents(pipe, size), denoiser_of(pipe)
    with chunk_feed_forward(model, latents) if chunks else nullcontext():
        return estimate_denoiser_peak(model, latents, batch=1 if alone else batch)


def _estimate_decoding(pipe: Any, size: Size, memory: float) -> tuple[VaeTiles | None, float]:
    """The largest tiles whose decoding fits, and its GiB; else the smallest. None is one piece."""
    latents = _count_latents(pipe, size)
    picture = 3 * 3 * math.prod(size) * 4 / GIB  # sum of tiles, their weights, and the result
    tiles, gib = None, estimate_decoder_peak(pipe.vae, latents)
    for side in TILE_SIDES:
        window = side + 2 * VaeTiles().margin
        if gib <= memory or window >= min(latents):
            continue
        tiles = VaeTiles(side=side)
        gib = estimate_decoder_peak(pipe.vae, (window, window)) + picture
    return tiles, gib


def _find_largest(pipe: Any, size: Size, memory: float, batch: int, share: float) -> Size | None:
    """The largest size of this shape that fits, tried from a share of its sides downwards."""
    unit = pixel_unit(pipe)
    while True:
        height, width = (math.floor(side * share / unit) * unit for side in size)
        if min(height, width) < unit:
            return None
        decoding = _estimate_decoding(pipe, (height, width), memory)[1]
        denoising = _estimate_denoising(pipe, (height, width), batch, *SAVINGS[-1])
        if max(decoding, denoising) <= memory:
            return height, width
        share *= 0.95


def _count_latents(pipe: Any, size: Size) -> Size:
    scale = latent_scale(pipe)
    return size[0] // scale, size[1] // scale


@contextmanager
def chunk_feed_forward(model: Denoiser, latents: Size) -> Iterator[None]:
    """Let the feed-forward layers of a denoiser take their tokens in chunks, for a while.

    Args:
        model: a denoiser.
        latents: (height, width) of the latents that it will be given.
    """
    sites = list_sites(model)
    shared = {site.block for site in sites if site.joint}
    with ExitStack() as stack:
        for site in sites:
            block, tokens = (
                model.get_submodule(site.block),
                math.prod(site_grid(model, site, latents)),
            )
            if site.block not in shared:  # as `set_chunk_feed_forward` sets them
                size = choose_chunk(tokens)
                stack.enter_context(replaced_attributes(block, _chunk_size=size, _chunk_dim=1))
            elif site.joint and tokens > CHUNK and hasattr(block, "ff"):
                stack.enter_context(_taken_in_chunks(block.ff))
        yield


class _InChunks(nn.Module):
    """A feed-forward layer that takes the tokens of an image in chunks, the last one smaller.

    A block of text and image would take both in chunks of the same size, which has to divide the
    number of either.
    """

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward: Any = super().forward
        parts = [forward(part, *args, **kwargs) for part in tokens.split(CHUNK, dim=1)]
        return torch.cat(parts, dim=1)


@contextmanager
def _taken_in_chunks(layer: Any) -> Iterator[None]:
    """Give a layer a subclass of its own, which a copy of the model has too, for a while."""
    stock = type(layer)
    layer.__class__ = type(f"Chunked{stock.__name__}", (_InChunks, stock), {})
    try:
        yield
    finally:
        layer.__class__ = stock


def choose_chunk(tokens: int) -> int | None:
    """The largest chunk that divides so many tokens and is not above `CHUNK`; None for one."""
    if tokens <= CHUNK:
        return None
    return next(size for size in range(CHUNK, 0, -1) if tokens % size == 0)


@contextmanager
def run_one_at_a_time(model: Denoiser) -> Iterator[None]:
    """Let a denoiser work on the samples of a batch one after the other, for a while."""

    def call_in_turn(forward: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        latents, kwargs = noisy_latents(model, args, kwargs), {**kwargs, "return_dict": False}
        count, listed = len(latents), isinstance(latents, list)
        outputs = [
            forward(*_take_sample(args, i, count, listed), **_take_sample(kwargs, i, count, listed))
            for i in range(count)
        ]
        return tuple(_join_samples(parts) for parts in zip(*outputs, strict=True))

    with wrapped_method(model, "forward", call_in_turn):
        yield


def _join_samples(parts: Sequence[Any]) -> Any:
    """What a denoiser gives for several batches, as for all their samples at once."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return [sample for part in parts for sample in part]  # Z-Image gives them one by one


def _is_shapes(told: Any) -> bool:
    """Whether this is shapes of the pictures of one sample, as Qwen-Image is told them."""
    pictures = told if isinstance(told, list) else [told]
    return all(isinstance(s, tuple) and all(isinstance(n, int) for n in s) for s in pictures)


def _take_sample(arguments: Any, index: int, count: int, listed: bool = False) -> Any:
    """One sample of nested arguments for a batch; what is no part of the batch stays.

    Args:
        arguments: of the denoiser, or a part of them.
        index: of the sample.
        count: samples of the batch.
        listed: whether the denoiser takes lists with a tensor for each sample.
    """
    shapes = isinstance(arguments, list) and all(map(_is_shapes, arguments))
    if (shapes or listed) and isinstance(arguments, list) and len(arguments) == count:
        return arguments[index : index + 1]
    if isinstance(arguments, tuple | list):  # residuals of a control net, pictures of IP-Adapters
        return type(arguments)(_take_sample(value, index, count, listed) for value in arguments)
    if isinstance(arguments, Mapping):
        return {
            name: value if name == GRID else _take_sample(value, index, count, listed)
            for name, value in arguments.items()
        }
    if isinstance(arguments, Tensor) and arguments.dim() and len(arguments) == count:
        return arguments[index : index + 1]
    return arguments
