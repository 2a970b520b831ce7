"""Denoisers without values, on the meta device, and what their attentions are called with there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, Site, example_inputs, family_of, site_grid
from convfusion.families.carrier import GRID, drop_grid
from convfusion.families.patches import copied_without_patches
from convfusion.mixers.tokens import Grid
from convfusion.surgery import mixers_of, revert


def copy_to_meta(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a model without values.

    Its settings and PyTorch's hooks are kept. What moves weights about, casts or compiles them is
    not: it would move and call the model itself, and changes little of what is estimated.
    """
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(
            torch.empty_like(p, device="meta", dtype=dtype if p.itemsize == 1 else p.dtype),
            requires_grad=False,
        )
        for p in model.parameters()
    }
    shapes |= {id(b): b.to("meta") for b in model.buffers()}
    return copied_without_patches(model, shapes)


def stock_on_meta(model: Denoiser) -> Denoiser:
    """A denoiser as it is without mixers and values: itself where it is that, else a copy.

    Raises:
        ConvFusionError: it is converted, and its attention was dropped.
    """
    converted = bool(mixers_of(model))
    if model.device.type == "meta" and not converted:
        return model
    shapes = copy_to_meta(model, model.dtype)
    if converted:
        revert(shapes)
    return shapes


def shape_of_site(model: Denoiser, site: Site) -> tuple[Any, ...]:
    """What tells a site from those that cost something else: equal for sites that cost the same."""
    weights = model.get_submodule(site.path).named_parameters()
    # Where text and image share attentions, those of another list may be called with other texts.
    place = site.path.partition(".")[0] if site.joint else ""
    layers = tuple((name, tuple(weight.shape)) for name, weight in weights if ".mixer." not in name)
    return (type(site.joint), place, site.channels, site.heads, site.level, layers)


class SiteCall(NamedTuple):
    """What an attention is called with.

    Attributes:
        args, kwargs: of the call; no grid is among them.
        grid: of its tokens, of those of the image where a text shares it.
    """

    args: tuple
    kwargs: dict[str, Any]
    grid: Grid

    def with_grid(self) -> dict[str, Any]:
        """Keyword arguments with the grid, as a converted attention takes them."""
        return {**self.kwargs, GRID: self.list_tensors()[0].new_empty(*self.grid, 0)}

    def list_tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [each for each in leaves if isinstance(each, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> SiteCall:
        """With each of its tensors changed."""

        def change_leaf(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(change_leaf, (self.args, self.kwargs))
        return SiteCall(args, kwargs, self.grid)


def find_joint_calls(
    model: Denoiser, latents: Grid, sites: Collection[Site], *, batch: int = 1
) -> dict[str, SiteCall]:
    """What some attentions are called with that text and image share, in shapes alone.

    The denoiser is called as its pipeline calls it, with as many tokens of text, until all of them
    were seen.

    Args:
        model: on the meta device, not converted; see `stock_on_meta`.
        latents: (height, width) of the latents, or (frames, height, width) of a video.
        sites: of the model.
        batch: samples.

    Returns:
        By path of the site.

    Raises:
        ConvFusionError: the model knows no places for latents so large.
    """
    calls: dict[str, SiteCall] = {}
    largest = family_of(model).largest_side(model)
    if largest is not None and max(latents[-2:]) > largest:
        raise ConvFusionError(
            f"this {type(model).__name__} draws latents of at most {largest} along a side, not "
            f"{latents[-1]}×{latents[-2]}"
        )

    def reader(site: Site) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = drop_grid(module, args, kwargs)
            calls[site.path] = SiteCall(*given, site_grid(model, site, latents))
            if len(calls) == len(sites):
                raise _AllSeenError

        return see

    if not sites:
        return calls
    with ExitStack() as stack:
        for site in sites:
            attention = model.get_submodule(site.path)
            handle = attention.register_forward_pre_hook(reader(site), with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad(), suppress(_AllSeenError):
            model(**example_inputs(model, latents, batch=batch, device="meta"))
    return calls


def latents_of_grid(model: Denoiser, site: Site, grid: Grid) -> Grid:
    """Sides of latents whose tokens lie on a grid at a site."""
    *frames, height, width = grid
    side = family_of(model).patch_size(model) * 2**site.level
    return (*frames, height * side, width * side)


class _AllSeenError(Exception):
    """Ends a forward pass of which no more is needed."""
