"""SD3Transformer2DModel with the image-only attentions of Stable Diffusion 3.5 Medium.

Its first blocks have two attentions: `attn`, in which text and image attend to each other, and
beside it `attn2`, of the image alone. The second are sites; the first are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import SD3Transformer2DModel

from convfusion.errors import ConvFusionError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Site, Size, Values
from convfusion.families.carrier import KeywordCarrier

WORDS = 77 + 256  # tokens that its text encoders read: CLIP's, then T5's

_CLASS = "SD3Transformer2DModel"


class SD3(Family):
    """SD3.5 Medium. SD3 and SD3.5 Large have joint attention only, and so no site."""

    name = "sd3"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"sd35-medium": {"*": 13}}  # as PixArt, whose grids it has
    full_size = {
        "sd35-medium": (
            _CLASS,
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
        )
    }
    without_sites = (
        "has no self-attention of the image alone, as Stable Diffusion 3.5 Medium has: text and "
        "image share every attention"
    )
    input_docs = {
        "hidden_states": "noisy latents",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "pooled_projections": "pooled outputs of both CLIP text encoders, side by side",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        return [
            Site(
                path=f"transformer_blocks.{number}.attn2",
                channels=block.attn2.query_dim,
                heads=block.attn2.heads,
                level=0,
                owner="",
                tap=f"transformer_blocks.{number}.norm2",
            )
            for number, block in enumerate(model.transformer_blocks)
            if getattr(block, "attn2", None) is not None
        ]

    def carrier(self, model: Denoiser) -> KeywordCarrier:
        patch = model.config.patch_size
        return KeywordCarrier.of(SD3Transformer2DModel, patch, "joint_attention_kwargs")

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, device=pipe.transformer.device,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

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

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} is not exported: its joint attention was not tried there"
        )


SD3_MEDIUM = SD3()
