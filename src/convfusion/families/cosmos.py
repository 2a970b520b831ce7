"""CosmosTransformer3DModel: NVIDIA's Cosmos 1.0, Predict 2 and 2.5, of videos and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.utils import is_torchvision_available

from convfusion.errors import ConvFusionError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import RotaryCarrier
from convfusion.families.rotary import HalvesTurn
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.families.wan import VIDEO_HALO, VIDEO_KERNELS

T5_WORDS = 512  # tokens that its text encoder reads
NATIVE_LATENTS = (88, 160)  # of 704×1280 pixels

_CLASS = "CosmosTransformer3DModel"
_PREDICT2 = {"extra_pos_embed_type": None, "rope_scale": (1.0, 3.0, 3.0), "in_channels": 17}


class Cosmos(Family):
    """Transformers on patches of the latents of a video, whose attention is diffusers' own."""

    name = "cosmos"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"cosmos": {"*": VIDEO_KERNELS}}
    halo = VIDEO_HALO
    full_size = {
        "cosmos-7b": (_CLASS, {}),  # 1.0, text to world
        "cosmos-14b": (
            _CLASS,
            {"num_attention_heads": 40, "num_layers": 36, "rope_scale": (2.0, 2.0, 2.0)},
        ),
        "cosmos2-2b": (_CLASS, {**_PREDICT2, "num_attention_heads": 16}),  # video to world
    }
    input_docs = {
        "hidden_states": "noisy latents of a video, [B, C, T, H, W]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "padding_mask": "1 where a picture was padded, [1, 1, H, W]",
    }
    frame_rate = 30
    frames = 16  # of 121 frames of a video
    rotary = True

    def list_sites(self, model: Denoiser) -> list[Site]:
        return [
            Site(
                path=f"transformer_blocks.{number}.attn1",
                channels=block.attn1.query_dim,
                heads=block.attn1.heads,
                level=0,
                owner="",
                tap=f"transformer_blocks.{number}.norm2",
                rank=3,
            )
            for number, block in enumerate(model.transformer_blocks)
        ]

    def carrier(self, model: Denoiser) -> RotaryCarrier:
        return RotaryCarrier(tuple(model.config.patch_size))

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> HalvesTurn:
        return HalvesTurn.of((*args, *kwargs.values()))

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size[-1]

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        raise ConvFusionError(  # `describe_further_needs` comes first
            "a Cosmos is told more than its prompts, which is not known here"
        )

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        """With a mask of padding, or tokens of a picture beside the text, where it takes them.

        Raises:
            ConvFusionError: diffusers resizes the mask with torchvision, which is not there.
        """
        config = model.config
        projected = config.use_crossattn_projection
        width = config.crossattn_proj_in_channels if projected else config.text_embed_dim
        text: Any = values(batch, words or T5_WORDS, width)
        if config.img_context_dim_in:
            shape = (batch, config.img_context_num_tokens, config.img_context_dim_in)
            text = (text, values(*shape))
        made = {"encoder_hidden_states": text}
        if config.concat_padding_mask:
            if not is_torchvision_available():
                raise ConvFusionError(
                    f"diffusers needs torchvision for this {type(model).__name__}: pip install "
                    "torchvision"
                )
            made["padding_mask"] = values.filled(0.0, 1, 1, *values.sides[-2:])
        return made

    def describe_further_needs(self, model: Denoiser) -> str:
        return "times of a schedule of its own, and in some versions frames to go on from"


COSMOS = Cosmos()
