"""See what every self-attention of a denoiser is given, without touching what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from convfusion.families.base import Denoiser, Site, family_of
from convfusion.families.lookup import list_sites
from convfusion.mixers import Grid


@contextmanager
def watch_attention(
    model: Denoiser, see: Callable[[Site, Any, Tensor, Grid], None]
) -> Iterator[None]:
    """Show every self-attention call of a denoiser to a function, before it happens.

    Args:
        model: not converted.
        see: called with the site, its diffusers `Attention`, its tokens [B, N, C] and their grid.
    """
    sites = list_sites(model)
    carrier = family_of(model).carrier(model)
    grids: dict[str, Grid] = {}  # by path of the owner

    def grid_reader(owner: str) -> Callable:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            grids[owner] = carrier.grid(args, kwargs)

        return read

    def attention_reader(site: Site) -> Callable:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            see(site, module, args[0] if args else kwargs["hidden_states"], grids[site.owner])

        return read

    readers = [(owner, grid_reader(owner)) for owner in dict.fromkeys(s.owner for s in sites)]
    readers += [(site.path, attention_reader(site)) for site in sites]
    handles = [
        model.get_submodule(path).register_forward_pre_hook(reader, with_kwargs=True)
        for path, reader in readers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of a diffusers `Attention` for tokens [B, N, C], each [B, h, N, C/h]."""
    parts = []
    for layer, norm in ((attention.to_q, "norm_q"), (attention.to_k, "norm_k")):
        heads = layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        normalise = getattr(attention, norm, None)
        parts.append(heads if normalise is None else normalise(heads))
    return parts[0], parts[1]
