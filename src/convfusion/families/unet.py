"""UNet2DConditionModel: SD1.x, SD2.x, SDXL and everything of their layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Transformer2DModel

from convfusion.errors import UnsupportedModelError
from convfusion.families.base import (
    Denoiser,
    Family,
    Site,
    Size,
    Values,
    is_self_attention,
    register,
    transformer_blocks,
)
from convfusion.families.carrier import KeywordCarrier

CLIP_WORDS = 77  # tokens that CLIP's text encoders read

_PLACE = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.")

# Kernel sizes of the paper's reference weights: about 60 % of the effective receptive field that
# was measured at each level. SD2.1 has SD1.5's sites and takes its sizes.
_SD15_KERNELS = {
    "down_blocks.0.*": 7,
    "down_blocks.1.*": 9,
    "down_blocks.2.*": 5,
    "mid_block.*": 3,
    "up_blocks.1.*": 5,
    "up_blocks.2.*": 9,
    "up_blocks.3.*": 11,
}
_SDXL_KERNELS = {
    "down_blocks.1.*": 9,
    "down_blocks.2.*": 7,
    "mid_block.*": 9,
    "up_blocks.0.*": 9,
    "up_blocks.1.*": 13,
}

# How many sites each block has, which tells the layouts apart.
_SD15_LAYOUT = {
    "down_blocks.0": 2,
    "down_blocks.1": 2,
    "down_blocks.2": 2,
    "mid_block": 1,
    "up_blocks.1": 3,
    "up_blocks.2": 3,
    "up_blocks.3": 3,
}
_SDXL_LAYOUT = {
    "down_blocks.1": 4,
    "down_blocks.2": 20,
    "mid_block": 10,
    "up_blocks.0": 30,
    "up_blocks.1": 6,
}

_CLASS = "UNet2DConditionModel"


class UNet(Family):
    """UNets whose transformer blocks stand in `Transformer2DModel`s, each with its own grid."""

    name = "unet"
    classes = (_CLASS,)
    component = "unet"
    latents = "sample"
    presets = {
        "default": {"*": 7},
        "sd15": _SD15_KERNELS,
        "sd21": _SD15_KERNELS,
        "sdxl": _SDXL_KERNELS,
    }
    full_size = {
        "sd15": (_CLASS, {"sample_size": 64, "cross_attention_dim": 768}),
        "sd21": (
            _CLASS,
            {
                "sample_size": 96,
                "attention_head_dim": (5, 10, 20, 20),
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
        ),
        "sdxl": (
            _CLASS,
            {
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": (
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
    }
    released_gate = "reference"

    def list_sites(self, model: Denoiser) -> list[Site]:
        """Those of its `Transformer2DModel`s: a motion module attends over time, not space."""
        levels = len(model.config.block_out_channels)
        return [
            Site(
                path=f"{path}.attn1",
                channels=block.attn1.query_dim,
                heads=block.attn1.heads,
                level=level_of(path, levels),
                owner=owner_of(path),
                tap=f"{path}.norm2" if block.attn2 is not None else f"{path}.norm3",
            )
            for path, block in transformer_blocks(model)
            if is_self_attention(block)
            and isinstance(model.get_submodule(owner_of(path)), Transformer2DModel)
        ]

    def carrier(self, model: Denoiser) -> KeywordCarrier:
        return KeywordCarrier.of(Transformer2DModel, patch=1)  # on feature maps

    def preset_for(self, model: Denoiser) -> str:
        """The preset whose layout of sites a model has, else `default`."""
        sites = self.list_sites(model)
        places = (re.match(r"(mid_block|\w+_blocks\.\d+)", site.path) for site in sites)
        layout = Counter(place.group(1) for place in places if place)
        if layout == _SDXL_LAYOUT:
            return "sdxl"
        if layout == _SD15_LAYOUT:
            return "sd21" if model.config.cross_attention_dim == 1024 else "sd15"
        return "default"

    def latent_unit(self, model: Denoiser) -> int:
        return 2 ** (len(model.config.block_out_channels) - 1)

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        device, prompts = pipe.unet.device, list(prompts)
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if pipe.unet.config.addition_embed_type != "text_time":
            return {"encoder_hidden_states": pipe.encode_prompt(prompts, device, **options)[0]}
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, **options)
        if pipe.config.force_zeros_for_empty_prompt:  # as SDXL draws without a negative prompt
            given = torch.tensor([bool(p) for p in prompts], device=device).to(embeds.dtype)
            embeds, pooled = embeds * given[:, None, None], pooled * given[:, None]
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=device)
        added = {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        config, words = model.config, words or CLIP_WORDS
        inputs: dict[str, Any] = {
            "encoder_hidden_states": values(batch, words, config.cross_attention_dim)
        }
        if config.addition_embed_type == "text_time":
            numbers = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - numbers
            inputs["added_cond_kwargs"] = {
                "text_embeds": values(batch, pooled),
                "time_ids": values(batch, 6),
            }
        return inputs


def owner_of(path: str) -> str:
    """Module path of the transformer that a block is part of."""
    return path.rsplit(".transformer_blocks.", 1)[0]


def level_of(path: str, levels: int) -> int:
    """How often the latents were halved before a transformer block of a UNet."""
    match = _PLACE.match(path)
    if match is None:
        raise UnsupportedModelError(f"{path} is in no down, mid or up block")
    kind, index = match.group(1), int(match.group(2) or 0)
    return {"down_blocks": index, "mid_block": levels - 1, "up_blocks": levels - 1 - index}[kind]


UNET = register(UNet())
