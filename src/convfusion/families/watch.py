"""See what every self-attention of a denoiser is given, without touching what it computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import UnsupportedModelError
from convfusion.families.base import Denoiser, Family, family_of
from convfusion.families.lookup import list_sites
from convfusion.families.sites import Site
from convfusion.mixers import Grid
from convfusion.mixers.base import read_maps
from convfusion.mixers.joint import stand_in
from convfusion.mixers.tokens import TokenSample, Turn


@contextmanager
def watch_attention(
    model: Denoiser, see: Callable[[Site, Any, TokenSample], None]
) -> Iterator[None]:
    """Show every self-attention call of a denoiser to a function, before it happens.

    Args:
        model: not converted.
        see: called with the site, its diffusers attention, and what that is given. Calls with the
            same rotary embedding have the same `turn`.

    Raises:
        UnsupportedModelError: its attentions turn queries and keys by a rotary embedding of a kind
            that is not known, so that tokens alone do not tell what they look at.
    """
    if not can_watch(model):
        raise UnsupportedModelError(
            f"the self-attention of a {type(model).__name__} turns its queries and keys by a "
            "rotary embedding, which analysis and measured starts do not know yet: convert it "
            "without"
        )
    with watch_tokens(model, see):
        yield


def can_watch(model: Denoiser) -> bool:
    """Whether what the self-attentions of a denoiser look at is known."""
    family = family_of(model)
    return not family.rotary or type(family).find_turn is not Family.find_turn


@contextmanager
def watch_tokens(model: Denoiser, see: Callable[[Site, Any, TokenSample], None]) -> Iterator[None]:
    """The same, of any denoiser: what an attention looks at may depend on more than its tokens."""
    sites, family = list_sites(model), family_of(model)
    carrier = family.carrier(model)
    turns: dict[Grid, Turn] = {}  # the last of each grid
    grids: dict[str, Grid] = {}  # by path of the owner

    def grid_reader(owner: str) -> Callable:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            grids[owner] = carrier.grid(args, kwargs)

        return read

    def attention_reader(site: Site) -> Callable:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            grid = grids[site.owner]
            if site.joint is not None:
                joint = site.joint.project(module, grid, *args, **kwargs)
                tokens = joint.image.value.transpose(1, 2).flatten(2)
                see(site, attention_at(model, site), TokenSample(tokens, grid, None, joint))
                return
            tokens = args[0] if args else kwargs["hidden_states"]
            if tokens.ndim == 4:
                tokens = read_maps(module, tokens)
            turn = family.find_turn(args, kwargs)
            if turn is not None:
                known = turns.get(grid)
                turn = turns[grid] = known if known and known.equals(turn) else turn
            see(site, module, TokenSample(tokens, grid, turn))

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


def attention_at(model: Denoiser, site: Site) -> Any:
    """The attention of a site, as what is measured of it takes it.

    Where a text shares it, a stand-in for the image's part, whose queries, keys and values come
    with each `TokenSample`.
    """
    attention: Any = model.get_submodule(site.path)
    if site.joint is None:
        return attention
    return stand_in(site.channels, site.heads, next(attention.parameters()).device)


class TokenReservoir:
    """Some of the tokens that each of several sites is given.

    Whole pictures are kept, each as [1, N, C] with its grid and rotary embedding: all of them where
    they fit, else a random choice among all that were seen, in which every picture has the same
    chance.

    Args:
        paths: of the sites.
        memory: GiB on the CPU for all sites; of each site, two pictures are kept in any case.
        seed: of the choice.

    Attributes:
        kept: what was kept, by path.
    """

    def __init__(self, paths: Collection[str], memory: float, seed: int = 0) -> None:
        self.kept: dict[str, list[TokenSample]] = {path: [] for path in paths}
        self._lots: dict[str, list[float]] = {path: [] for path in paths}  # of what is kept
        self._most: dict[str, int] = {}  # pictures of a site: as many as fit of the largest yet
        self._generator = torch.Generator().manual_seed(seed)
        self._room = memory * 2**30 / max(1, len(self.kept))  # bytes of a site

    def add(self, path: str, seen: TokenSample) -> None:
        """Look at what an attention was called with; those of further paths are passed over."""
        if path not in self.kept:
            return
        kept, lots = self.kept[path], self._lots[path]
        fit = max(2, int(self._room // seen.count_bytes()))
        most = self._most[path] = min(self._most.get(path, fit), fit)
        drawn = torch.rand(len(seen.tokens), generator=self._generator)  # the least lots stay
        for number, lot in enumerate(drawn):
            if len(lots) < most or lot < max(lots):
                kept.append(seen.map(partial(_take_picture, number)))
                lots.append(lot.item())
            while len(lots) > most:
                last = lots.index(max(lots))
                del kept[last], lots[last]


def _take_picture(number: int, tensor: Tensor) -> Tensor:
    return tensor[number : number + 1].detach().cpu().clone()


@contextmanager
def sample_attention(
    model: Denoiser, paths: Collection[str], memory: float, seed: int = 0
) -> Iterator[dict[str, list[TokenSample]]]:
    """Keep some of what every self-attention is given, while a denoiser is called.

    Args:
        model: not converted.
        paths, memory, seed: as of `TokenReservoir`.

    Yields:
        What was kept, by path; it fills while the model is called.
    """
    reservoir = TokenReservoir(paths, memory, seed)

    def see(site: Site, attention: Any, seen: TokenSample) -> None:
        reservoir.add(site.path, seen)

    with watch_attention(model, see):
        yield reservoir.kept
