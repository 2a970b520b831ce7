"""QwenImageTransformer2DModel: Qwen-Image and Qwen-Image-Edit.

Text and image have projections of their own in every block. Pictures to go by, as an edit has them,
follow the image in one sequence; they are attended to as the text is, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families.base import TEXT_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import argument_position, read_argument
from convfusion.families.joint import (
    JOINT_HALO,
    JointLayout,
    close,
    join_heads,
    mask_as_bias,
    project_image,
    project_text,
    split_heads_at,
    turn_pairs,
)
from convfusion.families.packed import SIDE, pack_squares, unpack_squares
from convfusion.families.sites import Site, list_joint_sites
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid, Heads, JointTokens

WORDS = 1024  # tokens that its text encoder reads at most
EXAMPLE_WORDS = 256  # of a long prompt: its pipelines pad to the longest of a batch
NATIVE_LATENTS = (166, 166)  # of 1328×1328 pixels
STEPS = 1000  # of its schedule

_CLASS = "QwenImageTransformer2DModel"
_SHAPES = "img_shapes"


class QwenLayout(JointLayout):
    """The text has its own projections; pictures to go by have those of the image."""

    processors = ("QwenDoubleStreamAttnProcessor2_0",)

    def project(
        self,
        attention: Any,
        grid: Grid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **_: Any,
    ) -> JointTokens:
        pictures = project_image(attention, hidden_states)
        text = project_text(attention, encoder_hidden_states)
        if image_rotary_emb is not None:
            pictures = _turn(pictures, image_rotary_emb[0])
            text = _turn(text, image_rotary_emb[1])
        image, further = split_heads_at(math.prod(grid), pictures)
        seen, count = encoder_hidden_states_mask, further.key.shape[2]
        if seen is not None:
            seen = torch.cat([seen.new_ones(len(seen), count), seen], dim=1)
        return JointTokens(image, join_heads(further, text), mask_as_bias(seen))

    def finish(
        self,
        attention: Any,
        image: Tensor,
        text: Tensor,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        count = hidden_states.shape[1] - image.shape[1]
        pictures = torch.cat([image, text[:, :count]], dim=1)
        return close(attention, pictures), attention.to_add_out(text[:, count:])


def _turn(heads: Heads, turn: Tensor) -> Heads:
    query, key, value = heads
    return Heads(turn_pairs(query, turn), turn_pairs(key, turn), value)


@dataclass(frozen=True)
class ShapesCarrier:
    """Sends the grid behind the rotary embedding of owners that are told shapes of pictures.

    Attributes:
        position: of `img_shapes` among the positional arguments of the owner.
    """

    position: int

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        return read_shapes(read_argument(args, kwargs, self.position, _SHAPES))

    def attach(self, owner: Any) -> RemovableHandle:
        return owner.pos_embed.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: tuple, kwargs: dict, output: tuple) -> tuple:
        grid = read_shapes(read_argument(args, kwargs, 0, "video_fhw"))
        return *output, output[0].new_empty((*grid, 0))


def read_shapes(shapes: Any) -> tuple[int, int]:
    """(H, W) of the picture that is drawn, which is the first one of each sample.

    Args:
        shapes: of each sample, (frames, height, width) of its picture, or a list of them with those
            that it goes by.

    Raises:
        ConvFusionError: they are not told, differ between samples, or have several frames.
    """
    if not shapes:
        raise ConvFusionError(
            "a converted Qwen-Image must be told img_shapes, as its pipeline does"
        )
    first = [each[0] if isinstance(each, list) else each for each in shapes]
    if any(tuple(each) != tuple(first[0]) for each in first) or first[0][0] != 1:
        raise ConvFusionError(
            "a converted Qwen-Image draws pictures of one size in a batch, and no layers or frames"
        )
    return first[0][1], first[0][2]


class QwenImage(Family):
    """Qwen-Image and Qwen-Image-Edit."""

    name = "qwenimage"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"qwenimage": {"*": JOINT_HALO}}
    halo = JOINT_HALO
    full_size = {"qwen-image": (_CLASS, {})}
    input_docs = {
        "hidden_states": "noisy latents, packed: [B, N, C]",
        "timestep": "σ of every sample: the deviation of its noise",
        "encoder_hidden_states": TEXT_DOCS,
        "encoder_hidden_states_mask": "true where there is a token of the text",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_joint_sites(model, ("transformer_blocks",), "attn", "img_norm2", _LAYOUT)

    def carrier(self, model: Denoiser) -> ShapesCarrier:
        return ShapesCarrier(argument_position(QwenImageTransformer2DModel, _SHAPES))

    def patch_size(self, model: Denoiser) -> int:
        return SIDE

    def latent_channels(self, model: Denoiser) -> int:
        return model.config.in_channels // SIDE**2

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        return (batch, math.prod(side // SIDE for side in sides), model.config.in_channels)

    def tell(self, timesteps: Tensor) -> Tensor:
        return timesteps / STEPS

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With latents packed, their sides, and captions cut to the longest of the batch."""
        told = {**conditioning, _SHAPES: _shape_samples(len(latents), latents.shape[2:])}
        seen = told["encoder_hidden_states_mask"]
        longest = int(seen.sum(1).max())
        for name in ("encoder_hidden_states", "encoder_hidden_states_mask"):
            told[name] = told[name][:, :longest]
        return super().arrange_inputs(model, pack_squares(latents), timesteps, told)

    def pack_drawn(self, model: Denoiser, latents: Tensor) -> Tensor:
        return pack_squares(latents)

    def unpack_latents(self, model: Denoiser, packed: Tensor, sides: Grid) -> Tensor:
        return unpack_squares(packed, sides)

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        """Captions padded to one length; `arrange_inputs` takes off what no sample needs."""
        states, seen = pipe.encode_prompt(list(prompts), max_sequence_length=WORDS)
        if seen is None:
            seen = states.new_ones(states.shape[:2])
        room = (0, WORDS - states.shape[1])
        return {
            "encoder_hidden_states": torch.nn.functional.pad(states, (0, 0, *room)),
            "encoder_hidden_states_mask": torch.nn.functional.pad(seen, room).bool(),
        }

    def guide(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Its pipelines guide by `true_cfg_scale`, and only where there is a negative prompt."""
        told = dict(options)
        scale = told.pop("guidance_scale", None)
        if scale is not None:
            told.setdefault("true_cfg_scale", scale)
            if scale > 1 and told.get("negative_prompt_embeds") is None:
                told.setdefault("negative_prompt", " ")
        return told

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        words = words or EXAMPLE_WORDS
        return {
            "encoder_hidden_states": values(batch, words, model.config.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(
                batch, words, dtype=torch.bool, device=values.device
            ),
            _SHAPES: _shape_samples(batch, values.sides),
        }

    def check_convert(self, model: Denoiser) -> None:
        if model.config.use_layer3d_rope:
            raise UnsupportedModelError(
                f"this {type(model).__name__} draws a picture in layers, which attend to each "
                "other: only those that draw one picture can be converted"
            )


def _shape_samples(batch: int, sides: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """(frames, height, width) of the tokens of each sample, for latents of these sides."""
    height, width = (side // SIDE for side in sides)
    return [[(1, height, width)]] * batch


_LAYOUT = QwenLayout()
QWEN_IMAGE = QwenImage()
