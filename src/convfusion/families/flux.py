"""FluxTransformer2DModel: FLUX.1, whose text and image share every attention.

Its first blocks have projections of their own for the text. The others, its single blocks, take the
text and behind it the image as one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.joint import (
    JOINT_HALO,
    JointLayout,
    close,
    project_image,
    project_text,
)
from convfusion.families.packed import SIDE, pack_squares, unpack_squares
from convfusion.families.placed import PlacedCarrier, place_tokens
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid, Heads, JointTokens

WORDS = 512  # tokens that its text encoder reads
NATIVE_LATENTS = (128, 128)  # of 1024×1024 pixels
GUIDANCE = 3.5  # that FLUX.1-dev is told, unless its pipeline is asked for another
STEPS = 1000  # of its scheduler, of which the model is told the part

_CLASS = "FluxTransformer2DModel"


class FluxLayout(JointLayout):
    """The text comes first, then the picture that is drawn, then what it goes by.

    Pictures to go by are attended to as the text is, exactly.
    """

    processors = ("FluxAttnProcessor",)

    def project(
        self,
        attention: Any,
        grid: Grid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **_: Any,
    ) -> JointTokens:
        own = project_image(attention, hidden_states)
        further = _count_further(image_rotary_emb)
        if encoder_hidden_states is None:
            words = max(0, hidden_states.shape[1] - math.prod(grid) - further)
        else:
            words = encoder_hidden_states.shape[1]
            own = _join(project_text(attention, encoder_hidden_states), own)
        if image_rotary_emb is not None:
            query, key = (_turn(each, image_rotary_emb) for each in own[:2])
            own = Heads(query, key, own.value)
        end = own.key.shape[2] - further
        image, text = Heads(*(each[:, :, words:end] for each in own)), _cut_out(own, words, end)
        return JointTokens(image, text, *self.read_mask(attention_mask, words, end))

    def read_mask(
        self, mask: Tensor | None, words: int, end: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is added to scores, as `JointTokens` has it.

        Args:
            mask: that the attention is given, in the order of its tokens.
            words: tokens of the text, which come first.
            end: of the tokens of the picture.

        Raises:
            ConvFusionError: there is one, which its own pipelines never give.
        """
        if mask is not None:
            raise ConvFusionError(
                "a converted FLUX takes no attention_mask, as of prompts for parts of a picture"
            )
        return None, None

    def finish(
        self, attention: Any, image: Tensor, text: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Single blocks have no output layers, and give one sequence."""
        further = text.shape[1] - _count_further(_read_rotary(*args, **kwargs))
        words, behind = text[:, :further], text[:, further:]
        if attention.pre_only:
            return torch.cat([words, image, behind], dim=1)
        rows = torch.cat([image, behind], dim=1) if behind.shape[1] else image
        return close(attention, rows), attention.to_add_out(words)


def _read_rotary(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **_: Any,
) -> Any:
    return image_rotary_emb


def _count_further(rotary: Any) -> int:
    """Tokens of pictures to go by; `PlacedCarrier` sends how many there are."""
    return rotary[2].shape[0] if rotary is not None and len(rotary) == 4 else 0


def _join(first: Heads, second: Heads) -> Heads:
    return Heads(*(torch.cat(both, dim=2) for both in zip(first, second, strict=True)))


def _cut_out(rows: Heads, start: int, end: int) -> Heads:
    """Rows without those from `start` to `end`."""
    before = Heads(*(each[:, :, :start] for each in rows))
    if end == rows.key.shape[2]:
        return before
    return _join(before, Heads(*(each[:, :, end:] for each in rows)))


def _turn(heads: Tensor, rotary: Any) -> Tensor:
    by_angle: Any = (rotary[0], rotary[1])
    turned: Any = apply_rotary_emb(heads, by_angle)
    return turned


class Flux(Family):
    """FLUX.1-dev, schnell and Kontext."""

    name = "flux"
    classes: ClassVar[tuple[str, ...]] = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets: ClassVar[Mapping[str, Any]] = {"flux": {"*": JOINT_HALO}}
    halo = JOINT_HALO
    full_size: ClassVar[Mapping[str, Any]] = {
        "flux1-dev": (_CLASS, {"guidance_embeds": True}),
        "flux1-schnell": (_CLASS, {}),
    }
    input_docs: ClassVar[Mapping[str, str]] = {
        "hidden_states": "noisy latents, packed: [B, N, C]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "pooled_projections": "pooled outputs of the CLIP text encoder",
        "guidance": "guidance scale that the model imitates",
    }
    attention_classes: ClassVar[tuple[type[nn.Module], ...]] = (FluxAttention,)
    layout: ClassVar[JointLayout] = FluxLayout()

    def list_sites(self, model: Denoiser) -> list[Site]:
        double = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
        single = [
            f"single_transformer_blocks.{i}" for i in range(len(model.single_transformer_blocks))
        ]
        taps = {path: f"{path}.norm2" for path in double}
        # A single block adds its attention together with its feed-forward layers.
        taps |= {path: f"{after}.norm" for path, after in pairwise(single)}
        if single:
            taps[single[-1]] = "norm_out"
        sites = []
        for path, tap in taps.items():
            attention = model.get_submodule(f"{path}.attn")
            sites.append(
                Site(
                    path=f"{path}.attn",
                    channels=attention.inner_dim,
                    heads=attention.heads,
                    level=0,
                    owner="",
                    tap=tap,
                    joint=self.layout,
                )
            )
        return sites

    def carrier(self, model: Denoiser) -> PlacedCarrier:
        return PlacedCarrier.of(FluxTransformer2DModel)

    def patch_size(self, model: Denoiser) -> int:
        return SIDE

    def latent_channels(self, model: Denoiser) -> int:
        return model.config.in_channels // SIDE**2

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        return (batch, math.prod(side // SIDE for side in sides), model.config.in_channels)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With latents packed, and where their tokens lie."""
        placed = self.place(latents, conditioning["encoder_hidden_states"].shape[1])
        told = {**conditioning, **placed}
        return super().arrange_inputs(model, pack_squares(latents), timesteps, told)

    def tell(self, timesteps: Tensor) -> Tensor:
        return timesteps / STEPS

    def place(self, like: Tensor, words: int) -> dict[str, Tensor]:
        """Where the tokens of latents [B, C, H, W] and of a text lie."""
        height, width = (side // SIDE for side in like.shape[2:])
        return {
            "img_ids": place_tokens(height, width).to(like.device, like.dtype),
            "txt_ids": like.new_zeros(words, 3),
        }

    def pack_drawn(self, model: Denoiser, latents: Tensor) -> Tensor:
        return pack_squares(latents)

    def unpack_latents(self, model: Denoiser, packed: Tensor, sides: Grid) -> Tensor:
        return unpack_squares(packed, sides)

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.transformer.device)
        inputs = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if pipe.transformer.config.guidance_embeds:
            inputs["guidance"] = embeds.new_full((len(prompts),), GUIDANCE)
        return inputs

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        words, config = words or WORDS, model.config
        inputs = {
            "encoder_hidden_states": values(batch, words, config.joint_attention_dim),
            "pooled_projections": values(batch, config.pooled_projection_dim),
            **self.example_places(words, values),
        }
        if config.guidance_embeds:
            inputs["guidance"] = values.filled(GUIDANCE, batch)
        return inputs

    def example_places(self, words: int, values: Values) -> dict[str, Tensor]:
        """Where tokens lie; on the CPU where there are shapes alone, since they are read."""
        device = "cpu" if str(values.device) == "meta" else values.device
        like = torch.empty(0, 0, *values.sides, device=device, dtype=values.dtype)
        return self.place(like, words)


FLUX_1 = Flux()
