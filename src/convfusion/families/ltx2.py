"""LTX2VideoTransformer3DModel: LTX-2, which draws a video and its sound in one transformer.

Each block has six attentions. That of the video to itself, `attn1`, is a site. Those of the sound
to itself, of both to the text, and of each to the other are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention, apply_split_rotary_emb
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Size
from convfusion.families.coordinates import PackedCarrier
from convfusion.families.ltx import FRAMES_PER_LATENT, LTX, JoinedTurn
from convfusion.families.rotary import PairTurn, find_angles, take_first
from convfusion.families.values import Values
from convfusion.mixers import DeltaConv

GEMMA_WORDS = 1024  # tokens that its text encoder reads
FRAMES_PER_SECOND = 24
SOUNDS_PER_SECOND = 25  # latents of the sound

_CLASS = "LTX2VideoTransformer3DModel"


class SplitTurn(PairTurn):
    """Turns channels i and i + d/2 of each head by one angle, which is another in each head.

    Attributes:
        cosine, sine: of the angle of each head, token and pair of channels, [h, N, d/2].
    """

    def __call__(self, heads: Tensor) -> Tensor:
        both: Any = tuple(each.to(heads.device, heads.dtype) for each in (self.cosine, self.sine))
        return apply_split_rotary_emb(heads, both)


class LTX2(LTX):
    """Transformers on packed latents of a video, and beside it of its sound."""

    name = "ltx2"
    classes = (_CLASS,)
    presets = {
        "ltx2": {"*": DeltaConv(kernel_size=7, frame_kernel_size=3, first_frame_branch=True)}
    }
    full_size = {"ltx-2": (_CLASS, {"rope_type": "split"})}
    input_docs = {
        "hidden_states": "noisy latents of a video, packed: [B, N, C]",
        "audio_hidden_states": "noisy latents of its sound, [B, L, C]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "audio_encoder_hidden_states": "the same for the sound",
    }
    attention_classes = (LTX2Attention,)
    frames = 16  # of 121 frames of a video
    next_layer = "norm2"
    frame_rate = FRAMES_PER_SECOND
    spacing: ClassVar[Mapping[str, Any]] = {}  # it knows its own

    def carrier(self, model: Denoiser) -> PackedCarrier:
        return PackedCarrier.of(LTX2VideoTransformer3DModel)

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PairTurn:
        """Of heads by themselves or side by side, by `rope_type`.

        Raises:
            ConvFusionError: beside its tokens, the attention is given what changes its scores.
        """
        for name in ("attention_mask", "perturbation_mask"):
            if kwargs.get(name) is not None:
                raise ConvFusionError(
                    f"the video attends to itself with a {name} here, which analysis and measured "
                    "starts leave out: call the model without"
                )
        cosine, sine = map(take_first, find_angles((*args, *kwargs.values())))
        return (JoinedTurn if cosine.ndim == 2 else SplitTurn)(cosine, sine)

    def native_latents(self, model: Denoiser) -> Size:
        return 16, 24  # of 512×768 pixels

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        raise ConvFusionError(  # `describe_further_needs` comes first
            "LTX-2 is told more than its prompts, which is not known here"
        )

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        """With as much sound as the frames of the video last, at 24 a second."""
        config, words, (frames, height, width) = model.config, words or GEMMA_WORDS, values.sides
        seconds = ((frames - 1) * FRAMES_PER_LATENT + 1) / FRAMES_PER_SECOND
        sounds = max(1, round(SOUNDS_PER_SECOND * seconds))
        widths = (config.cross_attention_dim, config.audio_cross_attention_dim)
        if config.use_prompt_embeddings:
            widths = (config.caption_channels,) * 2
        made = {
            "audio_hidden_states": values(batch, sounds, config.audio_in_channels),
            "encoder_hidden_states": values(batch, words, widths[0]),
            "audio_encoder_hidden_states": values(batch, words, widths[1]),
            "num_frames": frames,
            "height": height,
            "width": width,
            "audio_num_frames": sounds,
        }
        if model.prompt_modulation:
            made["sigma"] = values.filled(500.0, batch)
        return made

    def describe_further_needs(self, model: Denoiser) -> str:
        return "the sound of a video"


LTX_2 = LTX2()
