"""UNet2DModel: unconditional UNets of pixels or latents, as of DDPM.

Their self-attentions are no part of transformer blocks. Each takes maps [B, C, H, W], norms them,
and adds them to what it gives, so that it knows its own grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models.attention_processor import Attention

from convfusion.errors import ConvFusionError
from convfusion.families.base import TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import MapsCarrier
from convfusion.families.sites import Site
from convfusion.families.unet import level_of
from convfusion.families.values import Values

_CLASS = "UNet2DModel"
_PLAIN = ("DownBlock2D", "UpBlock2D")  # without attention


class DDPM(Family):
    """UNets that draw from noise alone, or from the number of a class."""

    name = "ddpm"
    classes = (_CLASS,)
    component = "unet"
    latents = "sample"
    presets = {"ddpm": {"*": 7}}
    full_size = {
        "ddpm-256": (  # of faces, of churches
            _CLASS,
            {
                "sample_size": 256,
                "block_out_channels": (128, 128, 256, 256, 512, 512),
                "down_block_types": (*(_PLAIN[0],) * 4, "AttnDownBlock2D", _PLAIN[0]),
                "up_block_types": (_PLAIN[1], "AttnUpBlock2D", *(_PLAIN[1],) * 4),
                "attention_head_dim": None,
                "downsample_padding": 0,
            },
        )
    }
    input_docs = {"sample": "noisy picture", "timestep": TIMESTEP_DOCS, "class_labels": "class"}
    captioned = False
    mixes_maps = True
    pixels_per_latent = 1
    without_sites = "has no self-attention to replace"

    def list_sites(self, model: Denoiser) -> list[Site]:
        levels = len(model.config.block_out_channels)
        return [
            Site(
                path=path,
                channels=module.query_dim,
                heads=module.heads,
                level=level_of(path, levels),
                owner=path,
                tap=find_tap(model, path),
            )
            for path, module in model.named_modules()
            if isinstance(module, Attention)
        ]

    def carrier(self, model: Denoiser) -> MapsCarrier:
        return MapsCarrier()

    def latent_unit(self, model: Denoiser) -> int:
        return 2 ** (len(model.config.block_out_channels) - 1)

    def native_latents(self, model: Denoiser) -> Size:
        if model.config.sample_size is None:
            raise ConvFusionError("this UNet2DModel does not say which size it draws")
        return super().native_latents(model)

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        raise ConvFusionError("a UNet2DModel draws without captions")

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        return {} if model.class_embedding is None else {"class_labels": values.zeros(batch)}


def find_tap(model: Denoiser, path: str) -> str:
    """What comes right after an attention; in an up block it gets a skip connection beside it."""
    block, _, number = path.rpartition(".attentions.")
    parent, following = model.get_submodule(block), int(number) + 1
    if block == "mid_block" or following < len(parent.resnets):
        return f"{block}.resnets.{following}"
    for name in ("downsamplers", "upsamplers"):
        if getattr(parent, name, None) is not None:
            return f"{block}.{name}.0"
    if block.startswith("down_blocks"):
        return "mid_block.resnets.0" if model.mid_block is not None else "up_blocks.0.resnets.0"
    place = int(block.rpartition(".")[2]) + 1
    last = place == len(model.up_blocks)
    return "conv_norm_out" if last else f"up_blocks.{place}.resnets.0"


DDPM_UNET = DDPM()
