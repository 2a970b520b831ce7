"""Attention within a window: the square of NATTEN, the circle of CLEAR."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import ProjectedMixer, TokenMixer, check_grid
from convfusion.mixers.tokens import Grid
from convfusion.mixers.windows import circular_attention, neighbourhood_attention
from convfusion.settings import check_fields


@dataclass(frozen=True)
class Neighbourhood:
    """The site's own attention, restricted to the nearest window × window tokens (NATTEN's rule).

        out_i = W_o·Σ_{j ∈ window(i)} softmax_j(q_i·k_jᵀ/√d)·v_j + b_o

    Near the border the window moves inwards, so that every token attends to as many keys. On a
    grid no larger than the window it is the full attention.
    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143.

    Attributes:
        window: odd side K, in tokens.
    """

    window: int = 13

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window < 1 or self.window % 2 == 0:
            raise ConvFusionError(f"window must be odd and positive, not {self.window}")

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return NeighbourhoodMixer(channels, heads, self)


@dataclass(frozen=True)
class Circular:
    """The site's own attention within a circle, and to one mean token.

        out_i = W_o·Σ_j softmax_j(q_i·k_jᵀ/√d)·v_j + b_o,   j: |p_i − p_j| < radius, or the mean

    p are positions on the grid, in tokens; at the border the circle is cut off. The mean token has
    the mean of all keys as its key and that of all values as its value.
    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    NeurIPS 2025, arXiv 2412.16112, for the circle. Their code can add keys and values of a pooled
    grid; the mean token is that grid at its coarsest, and `mean_token=False` leaves it out.

    Attributes:
        radius: r, in tokens; 1 is the token itself alone.
        mean_token: whether every token also attends to the mean token.
    """

    radius: int = 8
    mean_token: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.radius < 1:
            raise ConvFusionError(f"radius must be at least 1, not {self.radius}")

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return CircularMixer(channels, heads, self)


class NeighbourhoodMixer(ProjectedMixer):
    """softmax(q·kᵀ/√d)·v over the keys within the window of each query."""

    config: Neighbourhood

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        return self.join(neighbourhood_attention(*self.project(tokens), grid, self.config.window))


class CircularMixer(ProjectedMixer):
    """softmax(q·kᵀ/√d)·v over the keys within the circle of each query, and the mean token."""

    config: Circular

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        query, key, value = self.project(tokens)
        common = None
        if self.config.mean_token:
            common = (key.mean(dim=2, keepdim=True), value.mean(dim=2, keepdim=True))
        return self.join(
            circular_attention(query, key, value, grid, self.config.radius, common=common)
        )
