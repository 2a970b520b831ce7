"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5, whose text and image attend to each other.

Every block has an attention `attn` that text and image share. The first ones of Stable Diffusion
3.5 Medium have a second one beside it, `attn2`, of the image alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import KeywordCarrier
from convfusion.families.joint import (
    JOINT_HALO,
    JointLayout,
    close,
    project_image,
    project_text,
)
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid, JointTokens

T5_WORDS = 256  # tokens that it reads unless a pipeline is told otherwise
WORDS = 77 + T5_WORDS  # tokens that its text encoders read: CLIP's, then T5's

_CLASS = "SD3Transformer2DModel"


_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}


class SD3Layout(JointLayout):
    """Text and image have projections of their own; tokens of the image come first."""

    processors = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor")

    def project(
        self,
        attention: Any,
        grid: Grid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> JointTokens:
        image = project_image(attention, hidden_states)
        return JointTokens(image, project_text(attention, encoder_hidden_states))

    def finish(
        self, attention: Any, image: Tensor, text: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The last block throws the rows of the text away, and has no layer for them."""
        words = text if attention.context_pre_only else attention.to_add_out(text)
        return close(attention, image), words


class SD3(Family):
    """Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large."""

    name = "sd3"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {
        "sd3": {"*.attn": JOINT_HALO},
        "sd35-medium": {"*.attn": JOINT_HALO, "*.attn2": 13},  # as PixArt, whose grids it has
    }
    halo = JOINT_HALO
    full_size = {
        "sd3-medium": (_CLASS, _MEDIUM | {"pos_embed_max_size": 192}),
        "sd35-medium": (
            _CLASS,
            _MEDIUM
            | {
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        "sd35-large": (
            _CLASS,
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
        ),
    }
    input_docs = {
        "hidden_states": "noisy latents",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "pooled_projections": "pooled outputs of both CLIP text encoders, side by side",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        sites = []
        for number, block in enumerate(model.transformer_blocks):
            for name, layout in (("attn", _LAYOUT), ("attn2", None)):
                attention = getattr(block, name, None)
                if attention is None:
                    continue
                sites.append(
                    Site(
                        path=f"transformer_blocks.{number}.{name}",
                        channels=attention.inner_dim,
                        heads=attention.heads,
                        level=0,
                        owner="",
                        tap=f"transformer_blocks.{number}.norm2",
                        joint=layout,
                    )
                )
        return sites

    def preset_for(self, model: Denoiser) -> str:
        return "sd35-medium" if model.config.dual_attention_layers else "sd3"

    def carrier(self, model: Denoiser) -> KeywordCarrier:
        patch = model.config.patch_size
        return KeywordCarrier.of(SD3Transformer2DModel, patch, "joint_attention_kwargs")

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def largest_side(self, model: Denoiser) -> int:
        return model.config.pos_embed_max_size * model.config.patch_size

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, device=pipe.transformer.device,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def find_padding(self, pipe: Any, prompts: Sequence[str]) -> Tensor:
        """Both CLIP encoders read the same words, and T5 as many as it is asked for."""
        words = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = pipe.tokenizer(
            list(prompts), max_length=pipe.tokenizer_max_length, **words
        ).attention_mask
        if pipe.text_encoder_3 is None:
            t5 = torch.zeros(len(prompts), T5_WORDS, dtype=clip.dtype)
        else:
            t5 = pipe.tokenizer_3(list(prompts), max_length=T5_WORDS, **words).attention_mask
        return torch.cat([clip, t5], dim=1) == 0

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        config = model.config
        return {
            "encoder_hidden_states": values(batch, words or WORDS, config.joint_attention_dim),
            "pooled_projections": values(batch, config.pooled_projection_dim),
        }

    def idle_components(self, pipe: Any) -> tuple[str, ...]:
        """Its pipelines work without T5, whose place is then filled with zeros."""
        return ("text_encoder_3", "tokenizer_3") if pipe.text_encoder_3 is None else ()


_LAYOUT = SD3Layout()
STABLE_DIFFUSION_3 = SD3()
