"""What attentions and mixers are given: tokens on a grid, and heads of image and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Grid = tuple[int, ...]  # (H, W), or (T, H, W) of a video


class Turn(Protocol):
    """A rotary embedding: what turns queries and keys by where they lie."""

    def __call__(self, heads: Tensor) -> Tensor:
        """Queries or keys [B, h, N, d] as they are compared."""

    def equals(self, other: Any) -> bool:
        """Whether another one turns every token alike."""

    def __hash__(self) -> int:
        """By identity."""


class Heads(NamedTuple):
    """Queries, keys and values of some tokens, normed and turned, each [B, h, n, d]."""

    query: Tensor
    key: Tensor
    value: Tensor


class JointTokens(NamedTuple):
    """What an attention computes with that text and image share.

    Attributes:
        image: of its N tokens, row by row on their grid.
        text: of the T tokens of the text, with whatever else is attended to; no queries where the
            text only is attended to.
        bias: added to the scores of the text's keys in the rows of the image, [B, 1, 1, T], or None
            for nothing; the least number where a token is not seen.
        text_bias: added in the rows of the text, [B, 1, T or 1, N + T], with the keys of the image
            first; None for `bias`, and nothing for those of the image.
    """

    image: Heads
    text: Heads
    bias: Tensor | None = None
    text_bias: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> JointTokens:
        """With each of its tensors changed."""
        image, text = (Heads(*map(change, each)) for each in (self.image, self.text))
        bias, text_bias = (
            None if each is None else change(each) for each in (self.bias, self.text_bias)
        )
        return JointTokens(image, text, bias, text_bias)

    def take_words(self, most: int) -> JointTokens:
        """With the first tokens of the text alone, all of which are seen."""
        return JointTokens(self.image, Heads(*(each[:, :, :most] for each in self.text)))

    def count_words(self) -> Tensor:
        """Tokens of the text that a row of the image sees: [B, 1, 1, 1]."""
        if self.bias is None:
            size, words = self.text.key.shape[0], self.text.key.shape[2]
            return self.text.key.new_full((size, 1, 1, 1), words)
        seen = self.bias > torch.finfo(self.bias.dtype).min / 2
        return seen.sum(-1, keepdim=True).to(self.bias.dtype)


class TokenSample(NamedTuple):
    """What an attention was seen with.

    Attributes:
        tokens: [B, N, C]; where text and image share an attention, values of the image.
        grid: of the tokens.
        turn: what turns its queries and keys by where they lie; None without rotary embedding.
        joint: what an attention computes with that text and image share; None of another one.
    """

    tokens: Tensor
    grid: Grid
    turn: Turn | None = None
    joint: JointTokens | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenSample:
        """With its tensors changed, such as one picture of each or all on another device."""
        joint = None if self.joint is None else self.joint.map(change)
        return self._replace(tokens=change(self.tokens), joint=joint)

    def without_text(self) -> TokenSample:
        """With the tokens of the image alone."""
        if self.joint is None:
            return self
        return self._replace(joint=self.joint.take_words(0))

    def count_bytes(self) -> int:
        """Of its tensors, for each picture."""
        sizes: list[int] = []

        def count(each: Tensor) -> Tensor:
            sizes.append(each[0].numel() * each.element_size())
            return each

        self.map(count)
        return sum(sizes)

    def with_tokens(self, tokens: Tensor) -> TokenSample:
        """With other tokens [B, N, C], and all else as it was."""
        if self.joint is None:
            return self._replace(tokens=tokens)
        heads = self.joint.image.value.shape[1]
        image = self.joint.image._replace(value=tokens.unflatten(2, (heads, -1)).transpose(1, 2))
        return self._replace(tokens=tokens, joint=self.joint._replace(image=image))

    @property
    def inputs(self) -> Any:
        """What a mixer in the place of the attention is given beside the grid."""
        return self.tokens if self.joint is None else self.joint
