"""See what every self-attention of a denoiser is given, without touching what it computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.families.base import Denoiser, Site, family_of
from convfusion.families.lookup import list_sites
from convfusion.mixers import Grid
from convfusion.mixers.base import TokenSample


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


@contextmanager
def sample_attention(
    model: Denoiser, paths: Collection[str], memory: float, seed: int = 0
) -> Iterator[dict[str, list[TokenSample]]]:
    """Keep some of what every self-attention is given, while a denoiser is called.

    Whole pictures are kept, each as [1, N, C] with its grid: all of them where they fit, else a
    random choice among all that were seen, in which every picture has the same chance.

    Args:
        model: not converted.
        paths: of the sites.
        memory: GiB on the CPU for all sites; of each site, two pictures are kept in any case.
        seed: of the choice.

    Yields:
        What was kept, by path; it fills while the model is called.
    """
    kept: dict[str, list[TokenSample]] = {path: [] for path in paths}
    lots: dict[str, list[float]] = {path: [] for path in paths}  # of the pictures that are kept
    most: dict[str, int] = {}  # pictures of a site: as many as fit of the largest yet
    generator = torch.Generator().manual_seed(seed)
    room = memory * 2**30 / max(1, len(kept))  # bytes of a site

    def see(site: Site, attention: Any, tokens: Tensor, grid: Grid) -> None:
        if (path := site.path) not in kept:
            return
        fit = max(2, int(room // (tokens[0].numel() * tokens.element_size())))
        most[path] = min(most.get(path, fit), fit)
        drawn = torch.rand(len(tokens), generator=generator)  # those of the least lots stay
        for picture, lot in zip(tokens.detach(), drawn, strict=True):
            if len(lots[path]) < most[path] or lot < max(lots[path]):
                kept[path].append((picture[None].cpu().clone(), grid))
                lots[path].append(lot.item())
            while len(lots[path]) > most[path]:
                last = lots[path].index(max(lots[path]))
                del kept[path][last], lots[path][last]

    with watch_attention(model, see):
        yield kept
