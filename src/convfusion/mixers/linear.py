"""Linear attention: no token is compared with another, all of them meet in one C/h × C/h sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from convfusion.mixers.base import ProjectedMixer, TokenMixer, check_grid
from convfusion.mixers.tokens import Grid

EPSILON = 1e-4  # keeps the normaliser off zero, also in float16


@dataclass(frozen=True)
class GeneralisedLinear:
    """LinFusion's layer: generalised (normalised, non-causal) linear attention.

        q = φ(W_q·(x + f_q(x))),   k = φ(W_k·(x + f_k(x))),   v = W_v·x,   φ(u) = elu(u) + 1
        f(x) = W_2·LeakyReLU(LayerNorm(W_1·x + b_1)) + b_2                    C → C → C
        out_i = W_o·(q_i·(Σ_j k_jᵀ·v_j)/N) / (q_i·(Σ_j k_j)ᵀ/N) + b_o

    head by head; f_q and f_k are separate. W_q, W_k, W_v and W_o come from the replaced attention;
    f_q and f_k are new and start as PyTorch starts layers, as in the authors' code.
    Source: Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", arXiv 2409.02097.
    """

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        return GeneralisedLinearMixer(channels, heads, self)


class GeneralisedLinearMixer(ProjectedMixer):
    """φ(q)·(φ(k)ᵀ·v) over φ(q)·(sum of φ(k)ᵀ), in time and memory linear in N."""

    ranks = (2, 3)

    def __init__(self, channels: int, heads: int, config: GeneralisedLinear) -> None:
        super().__init__(channels, heads, config)
        self.f_q = nonlinear(channels)
        self.f_k = nonlinear(channels)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        query = F.elu(self.split(self.to_q(tokens + self.f_q(tokens)))) + 1
        key = F.elu(self.split(self.to_k(tokens + self.f_k(tokens)))) + 1
        return self.join(linear_attention(query, key, self.split(self.to_v(tokens))))


def nonlinear(channels: int) -> nn.Sequential:
    """f: what bends the tokens before the query and key projections."""
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.LayerNorm(channels),
        nn.LeakyReLU(),
        nn.Linear(channels, channels),
    )


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """q_i·(Σ_j k_jᵀ·v_j) / (q_i·(Σ_j k_j)ᵀ) for positive q and k: [B, h, N, d] → [B, h, N, d].

    Both sums are taken as means, √N from each factor, which keeps them within float16.
    """
    root = key.shape[2] ** -0.5
    state = (key * root).transpose(2, 3) @ (value * root)
    normaliser = query @ key.mean(dim=2, keepdim=True).transpose(2, 3)
    return query @ state / (normaliser + EPSILON)
