"""LatteTransformer3DModel: Latte, whose blocks attend within frames and over time by turns.

The self-attentions within each frame are sites. Those over time are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import LatteTransformer3DModel

from convfusion.errors import ConvFusionError
from convfusion.families.base import (
    TEXT_DOCS,
    TIMESTEP_DOCS,
    Denoiser,
    Family,
    Size,
    list_plain_sites,
)
from convfusion.families.carrier import BlockCarrier
from convfusion.families.sites import Site
from convfusion.families.values import Values

T5_WORDS = 120  # tokens that its text encoder reads

_CLASS = "LatteTransformer3DModel"


class Latte(Family):
    """Transformers on patches of each frame, with further blocks over time between them."""

    name = "latte"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"latte": {"*": 13}}  # as PixArt, whose blocks it has
    full_size = {
        "latte": (
            _CLASS,
            {
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "cross_attention_dim": 1152,
                "attention_bias": True,
                "sample_size": 64,
                "patch_size": 2,
                "activation_fn": "gelu-approximate",
                "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False,
                "norm_eps": 1e-6,
                "caption_channels": 4096,
            },
        )
    }
    input_docs = {
        "hidden_states": "noisy latents of a video, [B, C, T, H, W]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
    }
    frame_rate = 8
    frames = 16

    def list_sites(self, model: Denoiser) -> list[Site]:
        sites = list_plain_sites(model)
        return [site for site in sites if site.path.startswith("transformer_blocks.")]

    def carrier(self, model: Denoiser) -> BlockCarrier:
        patch = model.config.patch_size
        return BlockCarrier.of(LatteTransformer3DModel, patch, "encoder_attention_mask")

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        """With zeros for padding, as its pipelines read several prompts at once: they cut one."""
        embeds, _ = pipe.encode_prompt(
            [*prompts, ""], do_classifier_free_guidance=False, device=pipe.transformer.device
        )
        return {"encoder_hidden_states": embeds[:-1]}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        width = model.config.caption_channels
        return {"encoder_hidden_states": values(batch, words or T5_WORDS, width)}

    def check_frames(self, model: Denoiser, frames: int) -> None:
        own = model.config.video_length
        if frames != own:
            raise ConvFusionError(f"this {type(model).__name__} draws clips of {own} frames only")

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} draws videos and is not exported: an export is of a "
            "denoiser of pictures"
        )


LATTE = Latte()
