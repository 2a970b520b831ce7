"""Joint attention in parts: text and image share one softmax, and a mixer does the image's part.

In models such as SD3 and FLUX, tokens of the image attend to those of the image and of the text in
one softmax. For the query q of an image token it splits exactly, with d channels of a head and
scores s_j = q·k_j/√d + bias_j:

    y   = σ(g)·A_I + (1 − σ(g))·A_T          g = LSE_I − LSE_T
    A_X = softmax(s_X)·V_X                   LSE_X = log Σ_{j in X} exp s_j

A_T and LSE_T cost N·T operations for N tokens of the image and T of the text. They stay exact, as
do the rows of the text, which attend to everything at T·(N + T). A mixer has to find A_I and LSE_I
at a cost that is linear in N. All projections, norms, rotary embeddings and output layers are the
attention's own: a mixer gets queries, keys and values.

σ(g) is the image's share of what a token attends to. A halo block needs no share: the text is among
the keys of its softmax (`mixers.joint_halo`). A mixer that compares no tokens, such as a
ΔConvBlock, works on the values, and its share is found by an estimate of LSE_I (`SharedMixer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convfusion.mixers.base import Mixer, TokenMixer, project_heads
from convfusion.mixers.halo_grid import GridLine, pool_cells
from convfusion.mixers.offsets import QUERIES, choose_queries
from convfusion.mixers.tokens import Grid, JointTokens, TokenSample

Share = Literal["predicted", "cells", "constant"]
CELLS = 4  # a side that image keys are pooled to, for the share that is found by them
ROWS = 2**22  # scores of text that are worked out at a time


class JointMixer(TokenMixer):
    """What stands in place of image-to-image attention where text and image share a softmax.

    Its `forward(tokens, grid)` takes `JointTokens` and returns what the image's rows gather from
    image and text, head by head side by side: [B, N, h·d]. The output layer is the attention's.
    """

    forward: Any


def attend_to_text(query: Tensor, tokens: JointTokens) -> tuple[Tensor, Tensor]:
    """A_T and LSE_T of rows of the image.

    Args:
        query: [B, h, Q, d], some or all of the image's.
        tokens: whose text is attended to.

    Returns:
        [B, h, Q, d], and [B, h, Q, 1] in float32; of no text 0 and the least number.
    """
    key, value = tokens.text.key, tokens.text.value
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if tokens.bias is not None:  # whose least number is none of a shorter dtype
        scores = scores.float() + tokens.bias
    total = scores.float().logsumexp(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    return scores.softmax(-1).to(value.dtype) @ value, total


def blend(own: Tensor, of_image: Tensor, query: Tensor, tokens: JointTokens) -> Tensor:
    """σ(g)·A_I + (1 − σ(g))·A_T at some queries of the image.

    Args:
        own: A_I, [B, h, Q, d].
        of_image: LSE_I, [B, h, Q, 1], in float32.
        query: [B, h, Q, d].
        tokens: whose text is attended to.
    """
    gathered, of_text = attend_to_text(query, tokens)
    share = torch.sigmoid(of_image - of_text).to(own.dtype)
    return gathered + share * (own - gathered)


def split_rows(tokens: JointTokens, *each: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows [B, h, N, ·] in parts whose scores of the text fit; all at once while compiling."""
    if torch.compiler.is_compiling():
        yield each
        return
    batch, heads, words, _ = tokens.text.key.shape
    size = max(1, ROWS // (batch * heads * max(1, words)))
    yield from zip(*(rows.split(size, dim=2) for rows in each), strict=True)


def attend_from_image(tokens: JointTokens) -> Tensor:
    """The rows of the image, exactly: [B, N, h·d], as the attention itself has them."""
    image, text = tokens.image, tokens.text
    key = torch.cat([image.key, text.key], dim=2)
    value = torch.cat([image.value, text.value], dim=2)
    bias = tokens.bias
    if bias is not None:
        bias = F.pad(bias, (image.key.shape[2], 0)).to(key.dtype)
    rows = F.scaled_dot_product_attention(image.query, key, value, attn_mask=bias)
    return rows.transpose(1, 2).flatten(2)


def attend_from_text(tokens: JointTokens) -> Tensor:
    """The rows of the text, exactly: [B, T, h·d]; none where the text has no queries."""
    image, text = tokens.image, tokens.text
    key = torch.cat([image.key, text.key], dim=2)
    value = torch.cat([image.value, text.value], dim=2)
    mask = tokens.text_bias
    if mask is None and tokens.bias is not None:
        mask = F.pad(tokens.bias, (image.key.shape[2], 0))  # scores of the image have none
    if mask is not None:
        mask = mask.to(key.dtype)
    rows = F.scaled_dot_product_attention(text.query, key, value, attn_mask=mask)
    return rows.transpose(1, 2).flatten(2)


class SharedMixer(JointMixer):
    """A token mixer on the values of the image, and its share; see `shared.Shared`.

    Args:
        channels, heads: of the attention.
        mixer: settings of what mixes the values.
        share: how LSE_I is estimated; see `shared.Shared`.
        config: settings that this is built from.

    Attributes:
        inner: mixes the values, [B, N, h·d].
        offset: a, [h]; None where the share is constant.
        slope: b, [h, d]; likewise.
    """

    has_measured_start = True

    def __init__(self, channels: int, heads: int, mixer: Mixer, share: Share, config: Any) -> None:
        super().__init__()
        self.config, self.heads, self.share = config, heads, share
        self.inner = mixer.build(channels, heads)
        self.ranks = self.inner.ranks
        if share == "constant":
            self.offset = self.slope = None
        else:
            self.offset = nn.Parameter(torch.zeros(heads))
            self.slope = nn.Parameter(torch.zeros(heads, channels // heads))

    def forward(self, tokens: JointTokens, grid: Grid) -> Tensor:  # type: ignore[override]
        """Rows of the image [B, N, h·d]; see `JointMixer`."""
        image, text = tokens.image, tokens.text
        values = image.value.transpose(1, 2).flatten(2)
        mixed = self.inner(values, grid).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if not text.key.shape[2]:
            return mixed.transpose(1, 2).flatten(2)
        parts = [
            self._blend(own, query, tokens, grid)
            for own, query in split_rows(tokens, mixed, image.query)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)

    def _blend(self, own: Tensor, query: Tensor, tokens: JointTokens, grid: Grid) -> Tensor:
        if self.share != "constant":
            return blend(own, self.estimate(query, tokens.image.key, grid), query, tokens)
        gathered, places = attend_to_text(query, tokens)[0], math.prod(grid)
        share = places / (places + tokens.count_words())
        return gathered + share.to(own.dtype) * (own - gathered)

    def estimate(self, query: Tensor, key: Tensor, grid: Grid) -> Tensor:
        """LSE_I of some queries [B, h, Q, d] by the keys of the image [B, h, N, d]: [B, h, Q, 1].

        The share must not be constant.
        """
        assert self.offset is not None and self.slope is not None
        learned = query.float() @ self.slope[:, :, None].float() + self.offset[:, None, None]
        return learned + estimate_total(query, key, grid, CELLS if self.share == "cells" else 1)

    @torch.no_grad()
    def init_from(self, attention: Any) -> None:
        """Start as if every token attended to all of the image alike."""
        self.inner.init_from(attention)

    @torch.no_grad()
    def start_from(self, attention: Any, sample: Sequence[TokenSample]) -> None:
        """Start the mixer by the image's part of the attention, and the share by regression."""
        alone = [each.without_text() for each in sample]
        if self.inner.has_measured_start:
            self.inner.start_from(attention, alone)
        if self.offset is not None:
            self._fit_share(attention, alone)

    def _fit_share(self, attention: Any, sample: Sequence[TokenSample]) -> None:
        """Set a and b to the least squares of LSE_I over some queries of each picture."""
        assert self.offset is not None and self.slope is not None
        rows, missed = [], []
        for each in sample:
            query, key, _ = project_heads(attention, each)
            query = query[:, :, choose_queries(query.shape[2], QUERIES).to(query.device)]
            scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
            cells = CELLS if self.share == "cells" else 1
            left = scores.logsumexp(-1, True) - estimate_total(query, key, each.grid, cells)
            rows.append(query.transpose(0, 1).flatten(1, 2))
            missed.append(left.transpose(0, 1).flatten(1, 2))
        inputs, targets = torch.cat(rows, 1).double(), torch.cat(missed, 1).double()
        centre, middle = inputs.mean(1, keepdim=True), targets.mean(1, keepdim=True)
        inputs, targets = inputs - centre, targets - middle
        square = inputs.transpose(1, 2) @ inputs
        ridge = 1e-4 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
        square = square + ridge * torch.eye(square.shape[1], dtype=square.dtype).to(square.device)
        slope = torch.linalg.solve(square, inputs.transpose(1, 2) @ targets)
        self.slope.copy_(slope[..., 0])
        self.offset.copy_((middle - centre @ slope)[:, 0, 0])

    def extra_repr(self) -> str:
        return f"share={self.share}"


def estimate_total(query: Tensor, key: Tensor, grid: Grid, cells: int) -> Tensor:
    """log Σ_c n_c·exp(q·k̄_c/√d) over the mean keys of cells² cells of n_c tokens: [B, h, Q, 1].

    By Jensen's inequality it is at most LSE_I.
    """
    lines = [GridLine(side, 1, 1, min(cells, side)) for side in grid]
    flat = key.transpose(1, 2).flatten(2)
    pooled = pool_cells(flat, lines).unflatten(2, (key.shape[1], -1)).transpose(1, 2)
    counts = torch.ones(1, device=key.device)
    for line in lines:
        counts = torch.kron(counts, line.count_cells(key.device)[0].to(counts.dtype))
    scores = (query @ pooled.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    return (scores + counts.log()).logsumexp(-1, keepdim=True)


@lru_cache(maxsize=4)
def stand_in(channels: int, heads: int, device: Any = "cpu") -> Any:
    """An attention of the image on its own values, for a mixer to start from.

    Its tokens are the values, so that its projections of values and outputs change nothing; queries
    and keys come with a `TokenSample`.
    """
    with torch.device(device):
        same = nn.Linear(channels, channels, bias=False).requires_grad_(False)
    if not same.weight.is_meta:
        nn.init.eye_(same.weight)
    return SimpleNamespace(
        to_q=same,
        to_k=same,
        to_v=same,
        to_out=[same],
        heads=heads,
        scale=(channels // heads) ** -0.5,
    )
