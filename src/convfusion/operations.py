"""Operations and memory of a model or of a part of it, counted on the meta device."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from convfusion.errors import ConvFusionError
from convfusion.families import (
    Denoiser,
    Site,
    count_sequences,
    denoiser_of,
    list_sites,
    site_grid,
)
from convfusion.mixers import Circular, Mixer, Neighbourhood
from convfusion.mixers.base import TokenMixer, build_mixer, projections
from convfusion.mixers.tokens import Grid, Heads, JointTokens
from convfusion.ops import library
from convfusion.shapes import SiteCall, find_joint_calls, shape_of_site, stock_on_meta
from convfusion.surgery.mixed import DroppedAttention, MixedAttention, put_mixer


def _sdpa_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch's counter knows the attention kernels of GPUs, and passes over the CPU's and ours.
MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_on_cpu,
    **library.FLOPS,
}


def count(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations (two per multiply-add) of one call, by PyTorch's counter.

    Matrix products, convolutions and attention count, on any device; additions, norms, gates and
    interpolation do not.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def mixer_operations(mixer: TokenMixer, tokens: Tensor, grid: Grid) -> int:
    """Operations of one call of a token mixer; of windowed attention, those of its windows."""
    settings, (_, count_of_tokens, channels) = mixer.config, tokens.shape
    if isinstance(settings, Neighbourhood | Circular):
        projections = 4 * 2 * count_of_tokens * channels**2
        return len(tokens) * (projections + 2 * 2 * channels * pairs_in_windows(settings, grid))
    return count(mixer, tokens, grid)


def pairs_in_windows(mixer: Neighbourhood | Circular, grid: Grid) -> int:
    """How many pairs of query and key a windowed attention compares on a grid (H, W).

    A kernel made for the window works out these and no more; the tiles of
    `convfusion.mixers.windows` also work out pairs that they then mask.
    """
    height, width = grid
    if isinstance(mixer, Neighbourhood):
        return height * width * min(mixer.window, height) * min(mixer.window, width)
    reach = range(1 - mixer.radius, mixer.radius)
    within = sum(
        max(0, height - abs(dy)) * max(0, width - abs(dx))
        for dy, dx in product(reach, reach)
        if dy**2 + dx**2 < mixer.radius**2
    )
    return within + height * width * mixer.mean_token


def site_operations(pipe_or_model: Any, size: Grid) -> dict[str, tuple[int, int]]:
    """Operations at each converted site for the latents of one sample.

    Their size is (height, width), or (frames, height, width) of a video, which is one sample even
    if its frames are mixed each by itself. Where text and image share an attention, its projections
    and what involves the text stay as they are, and count on both sides.

    Returns:
        By site path, those of the attention with its projections and those of what is there now.

    Raises:
        ConvFusionError: the attention was dropped, or nothing is converted.
    """
    model = denoiser_of(pipe_or_model)
    attentions = {site: model.get_submodule(site.path) for site in list_sites(model)}
    converted = {s: each for s, each in attentions.items() if isinstance(each, MixedAttention)}
    if any(isinstance(each, DroppedAttention) for each in converted.values()):
        raise ConvFusionError("the attention was dropped: there is nothing to compare with")
    counts: dict[str, tuple[int, int]] = {}
    joint = JointCounter(model, size, [site for site in converted if site.joint])
    for site, attention in converted.items():
        if site.joint:
            counts[site.path] = (
                joint.count(site).whole,
                joint.count(site, attention.mixer.config).whole,
            )
            continue
        grid = site_grid(model, site, size)
        mixer: Any = copy.deepcopy(attention.mixer).to("meta")
        tokens = _meta_tokens(attention, site.channels, grid)
        block = mixer_operations(mixer, tokens, grid)
        own = attention_operations(attention, site.channels, grid)
        times = count_sequences(model, site, size)
        counts[site.path] = (times * own, times * block)
    if not counts:
        raise ConvFusionError("this model is not converted: there is nothing to compare")
    return counts


def attention_operations(attention: Any, channels: int, grid: Grid) -> int:
    """Operations of a self-attention with its projections, for one sample on a grid.

    Args:
        attention: a diffusers `Attention` on any device, converted or not.
        channels: C of its tokens.
        grid: of the tokens.
    """
    plain: Any = copy.deepcopy(attention).to("meta")
    if isinstance(plain, MixedAttention):
        plain.__class__ = plain.stock  # type: ignore[assignment]
    return count(plain, _meta_tokens(plain, channels, grid))


def _meta_tokens(attention: Any, channels: int, grid: Grid) -> Tensor:
    """Tokens [1, N, C] as a self-attention takes them, without values."""
    dtype = projections(attention)[0].weight.dtype
    return torch.empty(1, math.prod(grid), channels, device="meta", dtype=dtype)


class JointOperations(NamedTuple):
    """Operations of an attention that text and image share, for one sample.

    Attributes:
        image: between tokens of the image, which is all that a mixer takes the place of.
        text: what tokens of the image gather from the text, and the rows of the text; it stays.
        projections: of image and text, before and after; they stay.
    """

    image: int
    text: int
    projections: int

    @property
    def kept(self) -> int:
        """What stays whatever is put there."""
        return self.text + self.projections

    @property
    def whole(self) -> int:
        """All of them."""
        return self.image + self.kept


class JointCounter:
    """Counts what is at the sites of a denoiser that text and image share.

    The denoiser is called on the meta device, as its pipeline calls it, and the attention and what
    may stand in for it are counted with the arguments that are seen there. Sites of the same shape
    are counted once.

    Args:
        pipe_or_model: a pipeline or denoiser, converted or not, on any device.
        latents: (height, width) of the latents, or (frames, height, width) of a video.
        sites: of it; those that text and image share are counted. All of them by default.

    Raises:
        ConvFusionError: a part of its attention was dropped.
    """

    def __init__(
        self, pipe_or_model: Any, latents: Grid, sites: Iterable[Site] | None = None
    ) -> None:
        model: Denoiser = denoiser_of(pipe_or_model)
        listed = list_sites(model) if sites is None else sites
        joint = [site for site in listed if site.joint]
        self._model = stock_on_meta(model) if joint else model
        self._shapes = {site.path: shape_of_site(self._model, site) for site in joint}
        first = {self._shapes[site.path]: site for site in reversed(joint)}
        calls = find_joint_calls(self._model, latents, first.values())
        self._calls = {shape: (site, calls[site.path]) for shape, site in first.items()}
        self._known: dict[Any, JointOperations] = {}

    def find_call(self, site: Site) -> SiteCall:
        """What the attention of a site is called with, or one of the same shape."""
        return self._calls[self._shapes[site.path]][1]

    def read_tokens(self, site: Site) -> JointTokens:
        """What the attention of a site computes with, without values."""
        first, call = self._calls[self._shapes[site.path]]
        attention = self._model.get_submodule(first.path)
        assert site.joint is not None
        with torch.no_grad():
            return site.joint.project(attention, call.grid, *call.args, **call.kwargs)

    def count(self, site: Site, mixer: Mixer | None = None) -> JointOperations:
        """Operations with a mixer of these settings, or of the attention itself."""
        key = (self._shapes[site.path], mixer)
        if key not in self._known:
            self._known[key] = self._count(site, mixer)
        return self._known[key]

    def _count(self, site: Site, mixer: Mixer | None) -> JointOperations:
        if mixer is not None:
            words = min(1, self.read_tokens(site).text.key.shape[2])
            grid = self.find_call(site).grid
            own = image_operations(mixer, site.channels, site.heads, grid, words)
            return self.count(site)._replace(image=own)
        image, text, *_ = self.read_tokens(site)
        call = self.find_call(site)
        whole = count(self.build(site), *call.args, **call.kwargs)
        every = [torch.cat(pair, dim=2) for pair in zip(image[1:], text[1:], strict=True)]
        between = _count_pairs(image.query, *image[1:])
        of_text = _count_pairs(image.query, *text[1:]) + _count_pairs(text.query, *every)
        return JointOperations(between, of_text, whole - between - of_text)

    def build(self, site: Site, mixer: Mixer | None = None) -> Any:
        """A copy of what is at a site, with a mixer of these settings or without, on meta."""
        first, _ = self._calls[self._shapes[site.path]]
        attention = copy.deepcopy(self._model.get_submodule(first.path))
        if mixer is not None:
            with torch.device("meta"):
                put_mixer(attention, site.build(mixer), site.path, site.joint)
        return attention


def image_operations(mixer: Mixer, channels: int, heads: int, grid: Grid, words: int = 1) -> int:
    """Operations of a mixer between tokens of an image that shares its attention with a text.

    What tokens of the image gather from the text is left out, which does not depend on the mixer.

    Args:
        mixer: settings of it.
        channels, heads: of the attention.
        grid: of the tokens of the image.
        words: 1, or 0 where there is no text, and so no share of it to be found.
    """
    with torch.device("meta"):
        module = build_mixer(mixer, channels, heads, joint=True)
        some = torch.empty(1, heads, math.prod(grid), channels // heads)
        tokens = JointTokens(Heads(some, some, some), Heads(some, some, some)).take_words(words)
    return count(module, tokens, grid) - _count_pairs(some, *tokens.text[1:])


def _count_pairs(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Operations of attention between heads [B, h, n, d]."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def operations_ratio(pipe_or_model: Any, size: tuple[int, int]) -> float:
    """Operations of all replaced attentions over those of their mixers, latents (height, width)."""
    counts = site_operations(pipe_or_model, size).values()
    return sum(attention for attention, _ in counts) / max(1, sum(mixer for _, mixer in counts))


def peak_bytes(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """The largest total size, in bytes, of the tensors that exist at once in a forward.

    Input and output count, and every tensor in between for as long as the code holds it; weights
    do not, nor what a kernel needs for itself. No graph is kept: it is the memory of drawing, not
    of training. Softmax attention is one operation without its N×N scores, as in the flash and
    memory-efficient kernels.

    Args:
        module: on the device of the tokens, usually meta; its dtype is theirs.
        args, kwargs: of its call.
    """
    alive = _Alive(module)
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            alive.add(leaf)
    with torch.no_grad(), alive, _FusedAttention():
        module(*args, **kwargs)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Sums up the storages that are in use after each operation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weights = (*module.parameters(), *module.buffers())
        self.ignored = {StorageWeakRef(tensor.untyped_storage()) for tensor in weights}
        self.storages: dict[StorageWeakRef, int] = {}  # in bytes
        self.total = 0  # of all that are listed, some of which may be gone
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return output

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self.storages or reference in self.ignored:
            return
        self.storages[reference] = storage.nbytes()
        self.total += storage.nbytes()
        if self.total > self.peak:  # only then does it matter what is gone
            self.storages = {k: v for k, v in self.storages.items() if not k.expired()}
            self.total = sum(self.storages.values())
            self.peak = max(self.peak, self.total)


class _FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention as one operation, which on meta would be taken apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _output_alone(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _output_alone(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])
