"""SkyReelsV2Transformer3DModel: Wan's layout, with an optional causal mask, which is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Attention
from diffusers.utils import is_ftfy_available
from torch import Tensor

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families.base import Denoiser, Size
from convfusion.families.values import Values
from convfusion.families.wan import VIDEO_KERNELS, Wan

NATIVE_LATENTS = (68, 120)  # of 544×960 pixels
FAST = [1]  # stands for 24 frames a second, as 0 does for 16

_CLASS = "SkyReelsV2Transformer3DModel"


class SkyReels(Wan):
    """SkyReels-V2, which also denoises frames that are at different times (diffusion forcing)."""

    name = "skyreels"
    classes = (_CLASS,)
    presets = {"skyreels": {"*": VIDEO_KERNELS}}
    full_size = {
        "skyreels-1.3b": (
            _CLASS,
            {
                "num_attention_heads": 12,
                "num_layers": 30,
                "ffn_dim": 8960,
                "inject_sample_info": True,
            },
        ),
        "skyreels-14b": (
            _CLASS,
            {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        ),
    }
    attention_classes = (SkyReelsV2Attention,)
    native = NATIVE_LATENTS
    frame_rate = 24
    frames = 25  # of 97 frames of a video
    shares_blocks_with = "wan"

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        made = super().example_conditioning(model, batch, words, values)
        if model.config.inject_sample_info:
            made["fps"] = FAST * batch
        return made

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        """As Wan does.

        Raises:
            ConvFusionError: its pipelines clean prompts with ftfy, which is not there.
        """
        if not is_ftfy_available():
            raise ConvFusionError(
                f"diffusers needs ftfy for a {type(pipe).__name__}: pip install ftfy"
            )
        return super().encode_prompts(pipe, prompts, size)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With a frame rate, for a model that is told one."""
        arranged = super().arrange_inputs(model, latents, timesteps, conditioning)
        if model.config.inject_sample_info:
            arranged.setdefault("fps", FAST * len(latents))
        return arranged

    def check_convert(self, model: Denoiser) -> None:
        frames = model.config.num_frame_per_block
        if frames > 1:
            raise UnsupportedModelError(
                f"this {type(model).__name__} attends causally, {frames} frames at a time "
                "(num_frame_per_block), which no mixer does: only its other mode, in which all "
                "frames see each other, is converted"
            )


SKYREELS = SkyReels()
