"""LTXVideoTransformer3DModel: LTX-Video, whose latents come packed, one token for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXAttention, apply_rotary_emb
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.coordinates import PackedCarrier
from convfusion.families.rotary import PairTurn, find_angles, take_first
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers import DeltaConv, Halo
from convfusion.mixers.tokens import Grid

T5_WORDS = 128  # tokens that its text encoder reads
FRAMES_PER_LATENT = 8
FRAMES_PER_SECOND = 25

_CLASS = "LTXVideoTransformer3DModel"


class JoinedTurn(PairTurn):
    """Turns the channels of all heads side by side, so that each head has angles of its own.

    Attributes:
        cosine, sine: of the angle of each token and channel, [N, h·d].
    """

    def __call__(self, heads: Tensor) -> Tensor:
        both = tuple(each.to(heads.device, heads.dtype) for each in (self.cosine, self.sine))
        turned: Any = apply_rotary_emb(heads.transpose(1, 2).flatten(2), both)
        return turned.unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)


class LTX(Family):
    """Transformers on packed latents of a video, with a rotary embedding of every token."""

    name = "ltx"
    classes: ClassVar[tuple[str, ...]] = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"ltx": {"*": DeltaConv(kernel_size=7, frame_kernel_size=3, first_frame_branch=True)}}
    halo = Halo(block=(2, 4, 4), window=(4, 8, 8), cells=(3, 4, 4))
    full_size = {
        "ltx-2b": (_CLASS, {}),
        "ltx-13b": (
            _CLASS,
            {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
        ),
    }
    input_docs = {
        "hidden_states": "noisy latents of a video, packed: [B, N, C]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "encoder_attention_mask": "1 for a token of the text, 0 for padding",
    }
    attention_classes: ClassVar[tuple[type[nn.Module], ...]] = (LTXAttention,)
    frames = 21  # of 161 frames of a video
    frame_rate = FRAMES_PER_SECOND
    pixels_per_latent = 32
    spacing: ClassVar[Mapping[str, Any]] = {
        "rope_interpolation_scale": (FRAMES_PER_LATENT / FRAMES_PER_SECOND, 32, 32)
    }  # of latents, in seconds and pixels
    rotary = True

    def list_sites(self, model: Denoiser) -> list[Site]:
        return [
            Site(
                path=f"transformer_blocks.{number}.attn1",
                channels=block.attn1.query_dim,
                heads=block.attn1.heads,
                level=0,
                owner="",
                tap=f"transformer_blocks.{number}.{self.next_layer}",
                rank=3,
            )
            for number, block in enumerate(model.transformer_blocks)
        ]

    next_layer: ClassVar[str] = "attn2"  # which the hidden state goes to right after `attn1`

    def carrier(self, model: Denoiser) -> PackedCarrier:
        return PackedCarrier.of(LTXVideoTransformer3DModel)

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PairTurn:
        cosine, sine = find_angles((*args, *kwargs.values()))
        return JoinedTurn(take_first(cosine), take_first(sine))

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        return (batch, math.prod(sides), model.config.in_channels)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With latents packed, their sides, and how far apart they lie."""
        frames, height, width = latents.shape[2:]
        sides = {"num_frames": frames, "height": height, "width": width}
        packed = latents.flatten(2).transpose(1, 2)
        told = {**self.spacing, **conditioning, **sides}
        return super().arrange_inputs(model, packed, timesteps, told)

    def unpack_latents(self, model: Denoiser, packed: Tensor, sides: Grid) -> Tensor:
        return packed.transpose(1, 2).unflatten(2, sides)

    def native_latents(self, model: Denoiser) -> Size:
        return 16, 22  # of 512×704 pixels

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, mask, *_ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=pipe.transformer.device
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        words, (frames, height, width) = words or T5_WORDS, values.sides
        return {
            "encoder_hidden_states": values(batch, words, model.config.caption_channels),
            "encoder_attention_mask": values.filled(1.0, batch, words),
            "num_frames": frames,
            "height": height,
            "width": width,
            **self.spacing,
        }

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} draws videos and is not exported: an export is of a "
            "denoiser of pictures"
        )


LTX_VIDEO = LTX()
