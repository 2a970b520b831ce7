"""UNets that draw videos frame by frame: AnimateDiff, and ModelScope's text-to-video.

They have the sites of an image UNet, on each frame by itself, and between them further layers that
attend over time, which are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.families.base import Denoiser
from convfusion.families.unet import SD15_KERNELS, SD15_LAYOUT, UNet, count_by_block
from convfusion.families.values import Values

_MOTION, _VIDEO = "UNetMotionModel", "UNet3DConditionModel"


class MotionUNet(UNet):
    """UNets of videos. Blocks of an image UNet fit the motion UNet that was made of it."""

    name = "motion_unet"
    classes = (_MOTION, _VIDEO)
    presets = {
        "motion_unet": {"*": 7},
        "animatediff": SD15_KERNELS,
        "modelscope": SD15_KERNELS,
    }
    full_size = {
        "animatediff": (_MOTION, {"sample_size": 64, "cross_attention_dim": 768}),
        "modelscope": (_VIDEO, {"sample_size": 32}),
    }
    frames = 16
    frame_rate = 8
    released_gate = None
    shares_blocks_with = "unet"

    def preset_for(self, model: Denoiser) -> str:
        """That of AnimateDiff or ModelScope for SD1.5's layout of sites, else `motion_unet`."""
        if count_by_block(self.list_sites(model)) != SD15_LAYOUT:
            return "motion_unet"
        return "animatediff" if takes_text_of_frames(model) else "modelscope"

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        inputs = super().example_conditioning(model, batch, words, values)
        if takes_text_of_frames(model):
            text = inputs["encoder_hidden_states"]
            inputs["encoder_hidden_states"] = text.repeat_interleave(values.sides[0], 0)
        return inputs

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With the text of every sample for each of its frames, where a model is given it so."""
        arranged = super().arrange_inputs(model, latents, timesteps, conditioning)
        text, count = arranged["encoder_hidden_states"], len(latents)
        if takes_text_of_frames(model) and len(text) == count:
            arranged["encoder_hidden_states"] = text.repeat_interleave(latents.shape[2], 0)
        return arranged

    def check_frames(self, model: Denoiser, frames: int) -> None:
        most = model.config.get("motion_max_seq_length")
        if most is not None and frames > most:
            raise ConvFusionError(
                f"this {type(model).__name__} draws clips of {most} frames at most, not {frames}"
            )

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} draws videos and is not exported: an export is of a "
            "denoiser of pictures"
        )


def takes_text_of_frames(model: Denoiser) -> bool:
    """Whether a model is given the text once for every frame, as AnimateDiff's is."""
    return any(kind.__name__ == _MOTION for kind in type(model).__mro__)


MOTION = MotionUNet()
