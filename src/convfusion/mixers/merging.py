"""Token merging: bipartite soft matching on a grid.

As in Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604, with fixed
destinations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convfusion.mixers.tokens import Grid


@dataclass(frozen=True)
class Matching:
    """Which tokens are merged away, and into which.

    Merged tokens stand in the order: sources that stay, destinations.

    Attributes:
        stays: [B, S − r] places of sources that stay, among the N tokens.
        merged: [B, r] places of sources that are merged away.
        into: [B, r] the destination of each, as its place among the D destinations.
        destinations: [D] places of the destinations.
    """

    stays: Tensor
    merged: Tensor
    into: Tensor
    destinations: Tensor

    def merge(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] → [B, N − r, C], each destination the mean of all that it stands for."""
        ends = tokens[:, self.destinations]
        gone = _take(tokens, self.merged)
        into = self.into[..., None].expand_as(gone)
        ends = ends.scatter_reduce(1, into, gone, reduce="mean")
        return torch.cat([_take(tokens, self.stays), ends], dim=1)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """[B, N − r, C] → [B, N, C]: who was merged away receives its destination's."""
        staying, ends = tokens.split([self.stays.shape[1], len(self.destinations)], dim=1)
        values = torch.cat([staying, ends, _take(ends, self.into)], dim=1)
        own = self.destinations.expand(len(tokens), -1)
        places = torch.cat([self.stays, own, self.merged], dim=1)
        return torch.zeros_like(values).scatter(1, places[..., None].expand_as(values), values)


@torch.no_grad()
def match(tokens: Tensor, grid: Grid, ratio: float, stride: int) -> Matching:
    """Match every source with its most similar destination, and choose the best matches.

    The first token of each whole stride × stride region is a destination. All cosines of sources
    and destinations are worked out: about N²/stride² numbers.

    Args:
        tokens: [B, N, C], row by row on the grid.
        grid: (H, W).
        ratio: of the N tokens, how many are merged away; at most all sources, and none on a grid
            without a whole region.
        stride: side of a region.
    """
    height, width = grid
    rows, columns = height // stride, width // stride
    first = torch.zeros(height, width, dtype=torch.bool, device=tokens.device)
    first[: rows * stride : stride, : columns * stride : stride] = True
    order = (~first).flatten().to(torch.uint8).argsort(stable=True)  # destinations, then sources
    destinations, sources = order.split([rows * columns, height * width - rows * columns])
    count = min(int(height * width * ratio), len(sources)) if len(destinations) else 0

    unit = F.normalize(tokens, dim=-1)
    if count:
        cosines = unit[:, sources] @ unit[:, destinations].transpose(1, 2)
        best, into = cosines.max(dim=-1)
    else:
        best = unit.new_zeros(len(tokens), len(sources))
        into = torch.zeros_like(best, dtype=torch.long)
    likest = best.argsort(dim=-1, descending=True)
    going, staying = likest[:, :count], likest[:, count:]
    return Matching(
        stays=sources[staying],
        merged=sources[going],
        into=into.gather(1, going),
        destinations=destinations,
    )


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens [B, N, C] at places [B, M]: [B, M, C]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
