"""How text and image share an attention, in each class of it: the contract, and common parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from convfusion.mixers.halo import Halo
from convfusion.mixers.tokens import Grid, Heads, JointTokens

JOINT_HALO = Halo(block=8, window=16, cells=8, key_ratio=1.0, value_ratio=1.0)
NOT_SEEN = torch.finfo(torch.float32).min  # a score that no softmax sees

Norm = Callable[[Tensor], Tensor] | None


class JointLayout(ABC):
    """How an attention of some class takes tokens of image and text, and hands them on.

    It is stateless: what it needs of a call is among the arguments.

    Attributes:
        processors: names of the processors that compute the attention as it is.
    """

    processors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def project(self, attention: Any, grid: Grid, *args: Any, **kwargs: Any) -> JointTokens:
        """Queries, keys and values as the attention compares them.

        Args:
            attention: the diffusers attention.
            grid: of the image's tokens.
            args, kwargs: that it is called with.
        """

    @abstractmethod
    def finish(self, attention: Any, image: Tensor, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the attention returns.

        Args:
            attention: the diffusers attention.
            image: what its rows of the image gathered, [B, N, h·d].
            text: what those of the text did, [B, T, h·d].
            args, kwargs: that it was called with.
        """


def split_heads(tokens: Tensor, heads: int, norm: Norm = None) -> Tensor:
    """Projected tokens [B, n, h·d] as [B, h, n, d], normed head by head."""
    parts = tokens.unflatten(-1, (heads, -1))
    return (parts if norm is None else norm(parts)).transpose(1, 2)


def project_image(attention: Any, tokens: Tensor) -> Heads:
    """By the layers `to_q`, `to_k`, `to_v` and the norms of queries and keys."""
    heads = attention.heads
    return Heads(
        split_heads(attention.to_q(tokens), heads, attention.norm_q),
        split_heads(attention.to_k(tokens), heads, attention.norm_k),
        split_heads(attention.to_v(tokens), heads),
    )


def project_text(attention: Any, tokens: Tensor) -> Heads:
    """By the layers `add_q_proj`, `add_k_proj`, `add_v_proj` and their norms."""
    heads = attention.heads
    return Heads(
        split_heads(attention.add_q_proj(tokens), heads, attention.norm_added_q),
        split_heads(attention.add_k_proj(tokens), heads, attention.norm_added_k),
        split_heads(attention.add_v_proj(tokens), heads),
    )


def turn_pairs(heads: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys [B, h, n, d], channels 2i and 2i + 1 of which are one complex number.

    Args:
        heads: the queries or keys.
        turn: what these are multiplied with, complex: [n, d/2], or [B, n, d/2] of each sample.
    """
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)).contiguous())
    turn = turn if turn.ndim == 2 else turn[:, None]
    return torch.view_as_real(pairs * turn).flatten(3).type_as(heads)


def split_heads_at(places: int, heads: Heads) -> tuple[Heads, Heads]:
    """Queries, keys and values of so many tokens, and of those behind them."""
    first = (each[:, :, :places] for each in heads)
    return Heads(*first), Heads(*(each[:, :, places:] for each in heads))


def join_heads(first: Heads, second: Heads) -> Heads:
    """Queries, keys and values of some tokens and, behind them, of others."""
    return Heads(*(torch.cat(both, dim=2) for both in zip(first, second, strict=True)))


def mask_as_bias(seen: Tensor | None) -> Tensor | None:
    """A mask [B, T], true where a token is seen, as scores to add: [B, 1, 1, T]."""
    if seen is None:
        return None
    bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen.bool(), NOT_SEEN)
    return bias[:, None, None]


def close(attention: Any, rows: Tensor) -> Tensor:
    """The output layer, and the dropout behind it where there is one."""
    for layer in attention.to_out:
        rows = layer(rows)
    return rows
