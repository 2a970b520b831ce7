"""A VAE in tiles: pictures of any size in bounded memory, without seams.

A tile alone would be normalised by statistics of its own, and its border would see zeros: that is
what makes seams. So every tile is computed with a margin of its neighbours that is then cut off,
and every GroupNorm takes the same mean and variance in all tiles. They come from a first pass over
the tiles, in which each is still normalised by itself. Then what a tile shows depends on what lies
about it and not on where the tiles begin; what is left of it, attention in the middle of the
autoencoder, fades from one tile to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.patches import wrapped_method
from convfusion.settings import check_fields


@dataclass(frozen=True)
class VaeTiles:
    """How a VAE works in tiles; lengths in latents.

    Attributes:
        side: of a tile without its margin.
        margin: what is computed beyond each side, and cut off.
        fade: neighbours fade into each other over twice as much; part of the margin.
        exact: find the statistics of each GroupNorm in turn, behind those before it. Without
            attention in the VAE the result is then that of one piece, up to rounding, for about
            half as many more passes as the VAE has GroupNorms.
    """

    side: int = 64
    margin: int = 16
    fade: int = 4
    exact: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.side < 1 or not 0 <= self.fade <= self.margin or 2 * self.fade > self.side:
            raise ConvFusionError(
                "tiles need a side of at least 1, and a fade of at most the margin and half the "
                f"side, not side {self.side}, margin {self.margin}, fade {self.fade}"
            )


class Span(NamedTuple):
    """A tile along one side: its core, and the window that is computed; in latents."""

    core: tuple[int, int]
    window: tuple[int, int]


def list_spans(length: int, tiles: VaeTiles) -> list[Span]:
    """The tiles along a side of so many latents."""
    spans = []
    for start in range(0, length, tiles.side):
        stop = min(length, start + tiles.side)
        window = (max(0, start - tiles.margin), min(length, stop + tiles.margin))
        spans.append(Span((start, stop), window))
    return spans


@contextmanager
def tile_vae(vae: Any, tiles: VaeTiles | None) -> Iterator[None]:
    """Let a VAE encode and decode in tiles for a while, and say so where its values overflow.

    Args:
        vae: an `AutoencoderKL`.
        tiles: None leaves it in one piece.
    """

    def decode(decode_whole: Any, latents: Tensor, return_dict: bool = True, **options: Any) -> Any:
        latents = latents.to(vae.dtype)
        if tiles is None:
            pictures = decode_whole(latents, return_dict=False, **options)[0]
        else:
            pictures = decode_in_tiles(vae, latents, tiles, decode_whole)
        check_finite(pictures, vae)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)

    def encode(encode_whole: Any, pictures: Tensor, return_dict: bool = True) -> Any:
        pictures = pictures.to(vae.dtype)
        if tiles is None:
            return encode_whole(pictures, return_dict=return_dict)
        posterior = DiagonalGaussianDistribution(
            encode_in_tiles(vae, pictures, tiles, encode_whole)
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    with wrapped_method(vae, "decode", decode), wrapped_method(vae, "encode", encode):
        yield


def check_tileable(vae: Any) -> None:
    """Raise a ConvFusionError unless a VAE can be run in these tiles."""
    if not issubclass(type(vae), AutoencoderKL):
        raise ConvFusionError(
            f"a {type(vae).__name__} cannot be run in tiles, which this picture needs: only an "
            "AutoencoderKL can"
        )
    if vae.use_tiling or vae.use_slicing:
        raise ConvFusionError("switch the VAE's own tiling and slicing off: tiles are made already")


def check_finite(pictures: Tensor, vae: Any) -> None:
    """Raise a ConvFusionError if a picture holds values that are not finite."""
    if not pictures.isfinite().all():
        raise ConvFusionError(
            f"the VAE's output is not finite in {vae.dtype}: use bfloat16 or float32"
        )


def decode_in_tiles(
    vae: Any, latents: Tensor, tiles: VaeTiles, decode: Callable[..., Any] | None = None
) -> Tensor:
    """Pictures [B, 3, H, W] of unscaled latents [B, C, h, w], by `vae.decode` or another method."""

    def piece(window: Tensor) -> Tensor:
        return (decode or vae.decode)(window, return_dict=False)[0]

    return _run_in_tiles(
        vae, vae.decoder, piece, latents, (1, _count_pixels_per_latent(vae)), tiles
    )


def encode_in_tiles(
    vae: Any, pictures: Tensor, tiles: VaeTiles, encode: Callable[..., Any] | None = None
) -> Tensor:
    """Means and log-variances [B, 2C, h, w] of pictures [B, 3, H, W] in −1…1.

    They come from `vae.encode`, or from the method that is given.
    """

    def piece(window: Tensor) -> Tensor:
        return (encode or vae.encode)(window, return_dict=False)[0].parameters

    return _run_in_tiles(
        vae, vae.encoder, piece, pictures, (_count_pixels_per_latent(vae), 1), tiles
    )


def _count_pixels_per_latent(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def _run_in_tiles(
    vae: Any,
    half: nn.Module,
    piece: Callable[[Tensor], Tensor],
    maps: Tensor,
    units: tuple[int, int],
    tiles: VaeTiles,
) -> Tensor:
    """Put maps through one half of a VAE in tiles.

    Args:
        vae: the autoencoder.
        half: its encoder or decoder.
        piece: what is done to a window of the maps.
        maps: [B, C, H, W].
        units: pixels per latent of what goes in and of what comes out.
        tiles: how large.
    """
    check_tileable(vae)
    height, width = (side // units[0] for side in maps.shape[-2:])
    places = [
        (down, across) for down in list_spans(height, tiles) for across in list_spans(width, tiles)
    ]
    norms = _SharedNorms(half)

    def run(place: tuple[Span, Span]) -> Tensor:
        (top, bottom), (left, right) = (
            (start * units[0], stop * units[0]) for _, (start, stop) in place
        )
        norms.place = place
        return piece(maps[..., top:bottom, left:right])

    # What was compiled before does not look for hooks, and every window has a shape of its own.
    with norms.installed(), torch.compiler.set_stance("force_eager"):
        norms.measure(run, places)
        if tiles.exact:
            norms.measure_in_turn(run, places)
        return _join(run, places, (height, width), units[1], tiles)


def _join(
    run: Callable[[tuple[Span, Span]], Tensor],
    places: list[tuple[Span, Span]],
    size: tuple[int, int],
    unit: int,
    tiles: VaeTiles,
) -> Tensor:
    """All windows without their margins, each faded into the next."""
    whole = weight = torch.empty(0)
    for place in places:
        part = run(place)
        if not whole.numel():
            sides = [side * unit for side in size]
            whole = part.new_zeros(*part.shape[:2], *sides)
            weight = part.new_zeros(sides)
        cover = torch.outer(
            *(_weigh_window(s, n, unit, tiles, part) for s, n in zip(place, size, strict=True))
        )
        rows, columns = (slice(s.window[0] * unit, s.window[1] * unit) for s in place)
        whole[..., rows, columns] += part * cover
        weight[rows, columns] += cover
    return whole / weight


def _weigh_window(span: Span, length: int, unit: int, tiles: VaeTiles, like: Tensor) -> Tensor:
    """How much a window counts along a side: 1 in its core, falling to 0 within the margin."""
    (start, stop), (first, last) = span
    at = torch.arange(first * unit, last * unit, device=like.device) + 0.5
    reach = max(tiles.fade * unit, 0.5)  # 0.5: pixels lie on one side of a border or the other
    cover = torch.ones_like(at)
    if start > 0:
        cover = cover * ((at - start * unit) / (2 * reach) + 0.5).clamp(0, 1)
    if stop < length:
        cover = cover * ((stop * unit - at) / (2 * reach) + 0.5).clamp(0, 1)
    return cover.to(like.dtype)


class _ReachedError(Exception):
    """The GroupNorm whose statistics are wanted has been passed."""


class _SharedNorms:
    """The GroupNorms of half a VAE, with one mean and variance for all tiles.

    Attributes:
        place: of the tile that is being computed.
    """

    place: tuple[Span, Span]

    def __init__(self, half: nn.Module) -> None:
        self._norms: list[Any] = [
            module for module in half.modules() if isinstance(module, nn.GroupNorm)
        ]
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}  # scale and shift by channel
        self._sums: dict[Any, Tensor] = {}
        self._wanted: Any = None
        self._measuring = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for norm in self._norms:
                stack.callback(norm.register_forward_hook(self._normalise).remove)
            yield

    def measure(
        self, run: Callable[[tuple[Span, Span]], Any], places: list[tuple[Span, Span]]
    ) -> None:
        """Find the statistics of every norm, each tile being normalised by itself."""
        self._measuring = True
        for place in places:
            run(place)
        self._measuring = False
        self._known = {norm: self._to_affine(norm, sums) for norm, sums in self._sums.items()}

    def measure_in_turn(
        self, run: Callable[[tuple[Span, Span]], Any], places: list[tuple[Span, Span]]
    ) -> None:
        """Find them again one after the other, behind norms that are known already."""
        order, self._known = list(self._sums), {}
        self._measuring = True
        for self._wanted in order:
            self._sums = {}
            for place in places:
                try:
                    run(place)
                except _ReachedError:
                    continue
            self._known[self._wanted] = self._to_affine(self._wanted, self._sums[self._wanted])
        self._measuring = False

    def _normalise(self, norm: Any, args: tuple, output: Tensor) -> Tensor | None:
        maps = args[0]
        if self._measuring and self._wanted in (None, norm):
            self._sums[norm] = self._sums.get(norm, 0) + self._sum(norm, maps)
            if self._wanted is norm:
                raise _ReachedError
        if norm not in self._known:
            return None
        scale, shift = (values.to(maps.dtype) for values in self._known[norm])
        beyond = (1,) * (maps.dim() - 2)
        return torch.addcmul(
            shift.unflatten(1, (-1, *beyond)), maps, scale.unflatten(1, (-1, *beyond))
        )

    def _sum(self, norm: Any, maps: Tensor) -> Tensor:
        """Count, sum and sum of squares of each group in the tile's core: [3, B, groups]."""
        groups = norm.num_groups
        window = [stop - start for _, (start, stop) in self.place]
        if maps.dim() == 3:  # tokens of the attention, at the size of the latents
            maps = maps.unflatten(2, window)
        cuts = []
        for span, side, length in zip(self.place, window, maps.shape[-2:], strict=True):
            unit = length // side
            first = span.window[0]
            cuts.append(slice((span.core[0] - first) * unit, (span.core[1] - first) * unit))
        core = maps[..., cuts[0], cuts[1]].unflatten(1, (groups, -1)).flatten(2).float()
        count = torch.full(core.shape[:2], core.shape[2], device=core.device)
        sums = (count, core.sum(2, dtype=torch.float64), core.square().sum(2, dtype=torch.float64))
        return torch.stack([values.double() for values in sums])

    @staticmethod
    def _to_affine(norm: Any, sums: Tensor) -> tuple[Tensor, Tensor]:
        """What a norm with these statistics multiplies each channel with, and adds: [B, C]."""
        mean = sums[1] / sums[0]
        inverse = (sums[2] / sums[0] - mean.square() + norm.eps).rsqrt()
        per_group = norm.num_channels // norm.num_groups
        scale = inverse.repeat_interleave(per_group, 1) * norm.weight
        return scale.float(), (norm.bias - mean.repeat_interleave(per_group, 1) * scale).float()
