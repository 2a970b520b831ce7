"""PixArtTransformer2DModel: PixArt-α and PixArt-Σ."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import PixArtTransformer2DModel

from convfusion.errors import ConvFusionError
from convfusion.families.base import (
    TEXT_DOCS,
    TIMESTEP_DOCS,
    Denoiser,
    Family,
    Size,
    TextReader,
    list_plain_sites,
)
from convfusion.families.carrier import KeywordCarrier
from convfusion.families.sites import Site
from convfusion.families.values import Values

T5_WORDS = 300  # tokens that PixArt-Σ's text encoder reads

_CLASS = "PixArtTransformer2DModel"


class PixArt(Family):
    """Transformers on patches of latents, told of captions by cross-attention."""

    name = "pixart"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"pixart": {"*": 13}}  # of the paper's reference weights
    full_size = {
        "pixart": (
            _CLASS,
            {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
        )
    }
    # Otherwise it draws at the nearest size of its training, and resizes that.
    call_options = {"use_resolution_binning": False}
    released_gate = "sigmoid"
    input_docs = {
        "hidden_states": "noisy latents, scaled by the scheduler's scale_model_input",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "encoder_attention_mask": "1 for a token of the text, 0 for padding",
        "added_cond_kwargs.resolution": "height and width in pixels",
        "added_cond_kwargs.aspect_ratio": "height over width",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_plain_sites(model)

    def carrier(self, model: Denoiser) -> KeywordCarrier:
        return KeywordCarrier.of(PixArtTransformer2DModel, model.config.patch_size)

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        if pipe.transformer.use_additional_conditions:
            raise ConvFusionError(
                "PixArt-α models with resolution conditions are not supported in distillation; "
                "PixArt-Σ and PixArt-α at 256 and 512 are"
            )
        embeds, mask, _, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=pipe.transformer.device
        )
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def text_readers(self, pipe: Any) -> tuple[TextReader, ...]:
        if pipe.transformer.use_additional_conditions:
            raise ConvFusionError(
                "PixArt-α models with resolution conditions are not exported as a whole; PixArt-Σ "
                "and PixArt-α at 256 and 512 are"
            )
        words = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
        return (TextReader("tokenizer", "text_encoder", words, masked=True, lowered=True),)

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        config, words = model.config, words or T5_WORDS
        width = config.caption_channels or config.cross_attention_dim
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:  # PixArt-α at 1024 pixels; its config may leave it open
            added = {"resolution": values(batch, 2), "aspect_ratio": values(batch, 1)}
        return {
            "encoder_hidden_states": values(batch, words, width),
            "encoder_attention_mask": values.filled(1.0, batch, words),
            "added_cond_kwargs": added,
        }


PIXART = PixArt()
