"""ChromaTransformer2DModel: Chroma, a FLUX.1 without CLIP and guidance scale, and with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Size
from convfusion.families.carrier import argument_position, read_argument
from convfusion.families.flux import WORDS, Flux, FluxLayout
from convfusion.families.joint import NOT_SEEN
from convfusion.families.placed import PlacedCarrier
from convfusion.families.values import Values

_CLASS = "ChromaTransformer2DModel"
_MASK, _TEXT = "attention_mask", "encoder_hidden_states"


class ChromaLayout(FluxLayout):
    """As FLUX.1, with the mask that Chroma's blocks make for each pair of tokens.

    Its blocks multiply the mask m [B, T + N] with itself, m_i·m_j for the row i and the key j. The
    attention reads such a product of truth values as what is seen, and one of numbers as what is
    added to the scores; so does this layout.
    """

    def read_mask(
        self, mask: Tensor | None, words: int, end: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a mask [B, 1, T + N, T + N]; the keys of the picture have one and the same in a row.

        What all keys of a row have in common changes no softmax: so the rows of the image are told
        how much more, or less, is added for a word than for a key of the picture.
        """
        if mask is None:
            return None, None
        of_image, of_text = mask[:, :, words : words + 1], mask[:, :, :words]
        if mask.dtype == torch.bool:
            bias = torch.zeros(of_image.shape, device=mask.device).masked_fill(~of_image, NOT_SEEN)
            # A row that sees nothing gives zeros, where the least number would give a mean.
            unseen = torch.zeros(of_text.shape, device=mask.device)
            text_bias = unseen.masked_fill(~of_text, -torch.inf)
        else:
            bias, text_bias = of_image - of_image[..., words : words + 1], of_text
        behind = torch.cat([text_bias[..., :words], text_bias[..., end:]], dim=3)
        text_bias = torch.cat([text_bias[..., words:end], behind], dim=3)
        return bias[..., :words], text_bias


@dataclass(frozen=True)
class ChromaCarrier(PlacedCarrier):
    """As that of FLUX.1; it also looks whether a mask sees all of the picture.

    Attributes:
        mask: position of `attention_mask`, [B, T + N], among the positional arguments.
        text: that of `encoder_hidden_states`, [B, T, C].
    """

    mask: int = argument_position(ChromaTransformer2DModel, _MASK)
    text: int = argument_position(ChromaTransformer2DModel, _TEXT)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = read_argument(args, kwargs, self.mask, _MASK)
        if mask is not None and not (torch.compiler.is_compiling() or mask.is_meta):
            own = mask[:, read_argument(args, kwargs, self.text, _TEXT).shape[1] :]
            if not (own == (1 if mask.dtype == torch.bool else own[:, :1])).all():
                raise ConvFusionError(
                    "a converted Chroma takes no attention_mask that leaves out a part of the "
                    "picture: for its tokens it must be 1"
                )
        super().__call__(module, args, kwargs)


class Chroma(Flux):
    """Chroma1."""

    name = "chroma"
    classes = (_CLASS,)
    presets = {"chroma": Flux.presets["flux"]}
    full_size = {"chroma1-hd": (_CLASS, {})}
    input_docs = {
        "hidden_states": "noisy latents, packed: [B, N, C]",
        "timestep": TIMESTEP_DOCS,
        _TEXT: TEXT_DOCS,
        _MASK: "1 for a token of the text and its first padding, and for those of the picture",
    }
    layout = ChromaLayout()

    def carrier(self, model: Denoiser) -> ChromaCarrier:
        return ChromaCarrier.of(ChromaTransformer2DModel)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The mask goes on over the tokens of the picture."""
        arranged = super().arrange_inputs(model, latents, timesteps, conditioning)
        mask = arranged[_MASK]
        whole = len(arranged["txt_ids"]) + len(arranged["img_ids"])
        return {**arranged, _MASK: F.pad(mask, (0, whole - mask.shape[1]), value=1)}

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, _, mask, *_ = pipe.encode_prompt(
            list(prompts), device=pipe.transformer.device, do_classifier_free_guidance=False
        )
        return {_TEXT: embeds, _MASK: mask}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        words = words or WORDS
        places = self.example_places(words, values)
        whole = words + len(places["img_ids"])
        return {
            _TEXT: values(batch, words, model.config.joint_attention_dim),
            _MASK: values.filled(1.0, batch, whole),
            **places,
        }


CHROMA = Chroma()
