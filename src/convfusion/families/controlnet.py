"""ControlNetModel: the encoder of a UNet once more, guided by a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convfusion.errors import ConvFusionError
from convfusion.families.base import Denoiser, Size
from convfusion.families.unet import (
    SD15_KERNELS,
    SD15_LAYOUT,
    SDXL_KERNELS,
    SDXL_LAYOUT,
    UNet,
    count_by_block,
)
from convfusion.families.values import Values

_CLASS = "ControlNetModel"


def _encoder_of(by_block: Mapping[str, int]) -> dict[str, int]:
    """What is said of a UNet's blocks, for those that a ControlNet has too."""
    return {block: value for block, value in by_block.items() if not block.startswith("up_blocks")}


class ControlNet(UNet):
    """ControlNets of UNets, each given by itself: the denoiser of a pipeline is its UNet.

    They predict no noise, but maps that the UNet adds to its own. So there is nothing to train or
    compare them by.
    """

    name = "controlnet"
    classes = (_CLASS,)
    component = "controlnet"
    presets = {
        "controlnet": {"*": 7},
        "controlnet-sd15": _encoder_of(SD15_KERNELS),
        "controlnet-sdxl": _encoder_of(SDXL_KERNELS),
    }
    full_size = {
        "controlnet-sd15": (_CLASS, {"cross_attention_dim": 768}),
        "controlnet-sdxl": (
            _CLASS,
            {
                "block_out_channels": (320, 640, 1280),
                "down_block_types": (
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
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
    released_gate = None

    def preset_for(self, model: Denoiser) -> str:
        """The preset for the encoder of SD1.5, SD2.x or SDXL, else `controlnet`."""
        layout = count_by_block(self.list_sites(model))
        known = {"controlnet-sd15": SD15_LAYOUT, "controlnet-sdxl": SDXL_LAYOUT}
        fits = (name for name, whole in known.items() if layout == _encoder_of(whole))
        return next(fits, "controlnet")

    def native_latents(self, model: Denoiser) -> Size:
        """Those of SD1.5 or SDXL, since its config does not say."""
        side = 128 if model.config.addition_embed_type == "text_time" else 64
        return side, side

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        config = model.config
        scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)  # pixels to a latent
        sides = (scale * side for side in values.sides)
        return {
            **super().example_conditioning(model, batch, words, values),
            "controlnet_cond": values(batch, config.conditioning_channels, *sides),
        }

    def describe_further_needs(self, model: Denoiser) -> str:
        return "a picture that guides it"

    def check_distill(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} is not distilled: it predicts neither noise nor a velocity, "
            "but maps that its UNet adds to its own"
        )

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} is not exported: it gives its UNet a tensor for each layer, "
            "and an exported file has one output"
        )


CONTROLNET = ControlNet()
