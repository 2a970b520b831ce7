"""A CLIP model or one of its kin: how well pictures agree with their prompts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convfusion.errors import ConvFusionError, first_line
from convfusion.evaluate.extractors import Extractor, load_network, open_extractor, tensor_of
from convfusion.evaluate.randomness import kept_random

PADDED = ("siglip", "siglip2")  # read their last token, so a text must fill the whole length
ENDLESS = 10**9  # tokens, beyond which a tokenizer knows no longest text
PADDING = 1e-3  # how far padding may move an embedding of length 1


@dataclass(frozen=True)
class Clip:
    """A CLIP model, for the agreement of pictures with their prompts.

    Attributes:
        images: its picture side.
        model: of both sides.
        tokenizer: of its texts.
        longest: tokens that it can read, or None if there is no limit.
        padded: whether a text is padded to these; else it is not padded at all.
    """

    images: Extractor
    model: Any
    tokenizer: Any
    longest: int | None
    padded: bool

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Embeddings [n, d] of prompts, cut to what the model can read.

        Each is embedded by itself, so that it depends on no other one.

        Raises:
            ConvFusionError: a prompt has no tokens, or some that the model does not know.
        """
        embeddings = {
            prompt: self.embed_text(prompt, self.padded) for prompt in dict.fromkeys(prompts)
        }
        return torch.stack([embeddings[prompt] for prompt in prompts])

    @torch.no_grad()
    def embed_text(self, prompt: str, padded: bool) -> Tensor:
        """The embedding [d] of a prompt, in float32 on the CPU."""
        told = self.tokenizer(
            prompt,
            padding="max_length" if padded else False,
            truncation=self.longest is not None,
            max_length=self.longest,
            return_tensors="pt",
        )
        taken = set(inspect.signature(self.model.get_text_features).parameters)
        if self.padded:
            taken -= {"attention_mask"}  # such models were trained without
        ids, known = told["input_ids"], self.model.config.text_config.vocab_size
        if not ids.numel() or ids.max() >= known:
            what = "tokens that it does not know" if ids.numel() else "no tokens"
            raise ConvFusionError(f"for {self.images.name} the prompt {prompt!r} has {what}")
        inputs = {name: each.to(self.model.device) for name, each in told.items() if name in taken}
        [embedding] = tensor_of(self.model.get_text_features(**inputs)).float().cpu()
        return embedding


def open_clip(name: str, device: str | torch.device = "cpu") -> Clip:
    """A CLIP model, or one of its kin such as SigLIP, by folder or Hub name.

    Raises:
        ConvFusionError: as for `open_extractor`; or it has no text side, or one that cannot tell
            what is in a text, whatever stands beside it.
    """
    from transformers import AutoTokenizer

    images = open_extractor(name)
    model: Any = getattr(images.network, "model", None)
    if not hasattr(model, "get_text_features"):
        raise ConvFusionError(f"{name} knows no texts: the CLIP score needs a CLIP model")
    tokenizer = load_network(AutoTokenizer, name)
    limits = (
        tokenizer.model_max_length,
        getattr(model.config.text_config, "max_position_embeddings", None),
    )
    known = [int(limit) for limit in limits if limit is not None and limit < ENDLESS]
    padded = model.config.model_type in PADDED
    clip = Clip(images, model, tokenizer, min(known, default=None), padded)
    with kept_random():
        check_texts(clip)
    model.to(device)
    return clip


def check_texts(clip: Clip) -> None:
    """Raise a ConvFusionError unless a model embeds short and long texts, where pictures lie."""
    name = clip.images.name
    if clip.padded and (clip.longest is None or clip.tokenizer.pad_token_id is None):
        lacking = "longest text" if clip.longest is None else "padding token"
        raise ConvFusionError(
            f"the tokenizer of {name} names no {lacking}, and the model reads padded texts only"
        )
    shown = clip.images([_make_grey()]).features
    try:
        embeddings = [
            clip.embed_text(text, clip.padded) for text in ("red", "a long prompt " * 2000)
        ]
        if not clip.padded and clip.longest and clip.tokenizer.pad_token_id is not None:
            embeddings.append(clip.embed_text("red", True))
    except ConvFusionError:
        raise
    except Exception as error:  # of whatever kind: model and tokenizer are not ours
        raise ConvFusionError(
            f"{name} cannot read texts of {clip.longest or 'any number of'} tokens: "
            f"{first_line(error)}"
        ) from None
    if any(each.shape != shown.shape[1:] or not each.isfinite().all() for each in embeddings):
        raise ConvFusionError(
            f"{name} gives texts {list(embeddings[0].shape)} numbers and pictures "
            f"{list(shown.shape[1:])}: the CLIP score needs as many, and finite ones"
        )
    if (
        len(embeddings) > 2
        and torch.dist(embeddings[0], embeddings[2]) > PADDING * embeddings[0].norm()
    ):
        raise ConvFusionError(
            f"what {name} sees in a text depends on how it is padded, and how it was trained is "
            "not known: give a CLIP or SigLIP model"
        )


def _make_grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), "grey")
