"""How much of what the tokens of an image attend to is text, where both share an attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convfusion.mixers.tokens import JointTokens


@dataclass(frozen=True)
class TextSums:
    """Sums over pictures of the mean over their queries.

    Attributes:
        pictures: how many went in.
        words: tokens of the text that were seen, summed too.
        share: of each head's attention that goes to the text, [h].
        told: pictures of which it is known which tokens of their text are padding.
        padding: share of each head's attention that goes to padding, over those pictures, [h].
    """

    pictures: int
    words: float
    share: Tensor
    told: int
    padding: Tensor

    def __add__(self, other: TextSums) -> TextSums:
        return TextSums(
            self.pictures + other.pictures,
            self.words + other.words,
            self.share + other.share,
            self.told + other.told,
            self.padding + other.padding,
        )


@dataclass(frozen=True)
class TextAnalysis:
    """What the tokens of an image attend to beside it.

    Attributes:
        words: tokens of the text that are seen, the mean over pictures.
        share: of the attention that goes to them, the mean over heads, timesteps and pictures.
        uniform_share: the same of uniform attention.
        padding: share of the attention that goes to padding of the text; None where that is not
            known.
        heads: as `share`, of each head.
        timesteps: as `share`, at each timestep.
    """

    words: float
    share: float
    uniform_share: float
    padding: float | None
    heads: list[float]
    timesteps: dict[float, float]


@torch.no_grad()
def measure_text_share(
    tokens: JointTokens, queries: Tensor, chunk: int, padding: Tensor | None = None
) -> TextSums:
    """The sums of some pictures.

    Args:
        tokens: what their attention computes with.
        queries: indices of those of the image that are looked at.
        chunk: how many queries of one picture are worked on at a time.
        padding: [B, T], true where a token of the text is padding; None where it is not known.
    """
    image, text = tokens.image, tokens.text
    heads, words = text.key.shape[1:3]
    scale = image.query.shape[-1] ** -0.5
    share, of_padding = (torch.zeros(heads, dtype=torch.float64) for _ in range(2))
    for number in range(len(image.query)):
        keys = torch.cat([image.key[number], text.key[number]], 1).float().transpose(1, 2)
        for part in queries.to(keys.device).split(max(1, chunk)):
            scores = image.query[number][:, part].float() @ keys * scale
            if tokens.bias is not None:
                scores[..., -words:] += tokens.bias[number]
            of_text = scores.softmax(-1)[..., scores.shape[-1] - words :]
            share += of_text.sum((1, 2)).double().cpu()
            if padding is not None:
                chosen = of_text[..., padding[number].to(of_text.device)]
                of_padding += chosen.sum((1, 2)).double().cpu()
    told = 0 if padding is None else len(image.query)
    seen = tokens.count_words().sum().item()
    return TextSums(len(image.query), seen, share / len(queries), told, of_padding / len(queries))


def summarise_text(by_timestep: dict[float, TextSums], places: int) -> TextAnalysis | None:
    """What the sums of a site say; None without any.

    Args:
        by_timestep: sums at each timestep.
        places: tokens of the image.
    """
    if not by_timestep:
        return None
    parts: Any = list(by_timestep.values())
    total: TextSums = sum(parts[1:], start=parts[0])
    words = total.words / total.pictures
    heads = total.share / total.pictures
    return TextAnalysis(
        words=words,
        share=heads.mean().item(),
        uniform_share=words / (words + places),
        padding=(total.padding.mean() / total.told).item() if total.told else None,
        heads=heads.tolist(),
        timesteps={
            time: (sums.share.mean() / sums.pictures).item() for time, sums in by_timestep.items()
        },
    )
