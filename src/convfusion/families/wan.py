"""WanTransformer3DModel: Wan 2.1 and 2.2, whose tokens lie in frames, rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttention

from convfusion.families.base import (
    TEXT_DOCS,
    TIMESTEP_DOCS,
    Denoiser,
    Family,
    Site,
    Size,
    Values,
)
from convfusion.families.carrier import RotaryCarrier
from convfusion.families.rotary import PairTurn
from convfusion.mixers import DeltaConv, Halo

UMT5_WORDS = 512  # tokens that its text encoder reads
NATIVE_LATENTS = (60, 104)  # of 480×832 pixels

_CLASS = "WanTransformer3DModel"


class Wan(Family):
    """Transformers on patches of the latents of a video, with rotary embeddings."""

    name = "wan"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"wan": {"*": DeltaConv(kernel_size=7, frame_kernel_size=3, first_frame_branch=True)}}
    halo = Halo(block=(2, 4, 4), window=(4, 8, 8), cells=(3, 4, 4))
    full_size = {
        "wan-1.3b": (
            _CLASS,
            {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "cross_attn_norm": True},
        ),
        "wan-14b": (_CLASS, {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}),
    }
    input_docs = {
        "hidden_states": "noisy latents of a video, [B, C, T, H, W]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "encoder_hidden_states_image": "embedding of the first frame",
    }
    attention_classes = (WanAttention,)
    frames = 21  # of 81 frames of a video
    rotary = True

    def list_sites(self, model: Denoiser) -> list[Site]:
        return [
            Site(
                path=f"blocks.{number}.attn1",
                channels=block.attn1.to_q.in_features,
                heads=block.attn1.heads,
                level=0,
                owner="",
                tap=f"blocks.{number}.norm2",
                rank=3,
            )
            for number, block in enumerate(model.blocks)
        ]

    def carrier(self, model: Denoiser) -> RotaryCarrier:
        return RotaryCarrier(tuple(model.config.patch_size))

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PairTurn:
        return PairTurn.of((*args, *kwargs.values()))

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size[-1]

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=UMT5_WORDS,
            device=pipe.transformer.device,
        )
        return {"encoder_hidden_states": embeds}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        made = {"encoder_hidden_states": values(batch, words or UMT5_WORDS, model.config.text_dim)}
        if model.config.image_dim is not None:
            made["encoder_hidden_states_image"] = values(batch, 257, model.config.image_dim)
        return made

    def describe_further_needs(self, model: Denoiser) -> str:
        return "an embedding of its first frame" if model.config.image_dim is not None else ""


WAN = Wan()
