"""UNetSpatioTemporalConditionModel: Stable Video Diffusion, which goes on from a picture.

Each of its transformers has blocks of two kinds by turns: one attends within each frame, and its
self-attentions are sites; the other attends over time, and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.families.base import Denoiser, Size
from convfusion.families.carrier import BlockCarrier
from convfusion.families.unet import SD15_KERNELS, SD15_LAYOUT, UNet, count_by_block, text_width
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid

_CLASS = "UNetSpatioTemporalConditionModel"


class SVD(UNet):
    """UNets that go on from a picture, which they are given in half of their channels."""

    name = "svd_unet"
    classes = (_CLASS,)
    owner_class = TransformerSpatioTemporalModel
    presets = {"svd_unet": {"*": 7}, "svd": SD15_KERNELS}
    full_size = {"svd": (_CLASS, {"sample_size": 96})}
    frame_rate = 7
    frames = 25
    released_gate = None
    input_docs = {}

    def carrier(self, model: Denoiser) -> BlockCarrier:
        return BlockCarrier.of(TransformerSpatioTemporalModel, 1, "encoder_hidden_states")

    def preset_for(self, model: Denoiser) -> str:
        """`svd` for the layout of sites that SD1.5 has too, else `svd_unet`."""
        return "svd" if count_by_block(self.list_sites(model)) == SD15_LAYOUT else "svd_unet"

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        frames, height, width = sides
        return (batch, frames, model.config.in_channels, height, width)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        return super().arrange_inputs(model, latents.transpose(1, 2), timesteps, conditioning)

    def unpack_latents(self, model: Denoiser, packed: Tensor, sides: Grid) -> Tensor:
        return packed.transpose(1, 2)

    def native_latents(self, model: Denoiser) -> Size:
        return 72, 128  # of 576×1024 pixels

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        raise ConvFusionError(  # `describe_further_needs` comes first
            "Stable Video Diffusion goes on from a picture, and takes no prompts"
        )

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        """The embedding of one picture, and three numbers: frame rate, motion, noise."""
        config = model.config
        numbers = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
        return {
            "encoder_hidden_states": values(batch, 1, text_width(model)),
            "added_time_ids": values(batch, numbers),
        }

    def describe_further_needs(self, model: Denoiser) -> str:
        return "a picture to go on from, its frame rate and how much moves"

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} draws videos and is not exported: an export is of a "
            "denoiser of pictures"
        )


SVD_UNET = SVD()
