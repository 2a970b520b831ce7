"""Kandinsky5Transformer3DModel, whose latents have their channels last.

Its rotary embedding is one tensor and is flattened on the way, so no grid can go behind it. What
reaches every self-attention of the video untouched are the settings of its sparse mode, a dict that
is None without that mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import GRID, argument_position
from convfusion.families.rotary import take_first, without_rotary
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.families.wan import VIDEO_HALO, VIDEO_KERNELS
from convfusion.mixers.tokens import Grid

QWEN_WORDS = 256  # tokens that its text encoder reads
NATIVE_LATENTS = (64, 96)  # of 512×768 pixels

_CLASS = "Kandinsky5Transformer3DModel"
_SPARSE = "sparse_params"


@dataclass(frozen=True)
class SparseCarrier:
    """Sends the grid among the settings of a sparse mode that is off.

    Attributes:
        patch: sides of a patch along the axes of the grid.
        position: where these settings stand among the positional arguments.
    """

    patch: tuple[int, ...]
    position: int

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(T, H, W) of the tokens, from the arguments of a call of the owner."""
        latents: Tensor = args[0] if args else kwargs["hidden_states"]
        sides = latents.shape[1:-1]
        return tuple(side // patch for side, patch in zip(sides, self.patch, strict=True))

    def attach(self, owner: nn.Module) -> RemovableHandle:
        return owner.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        positional = len(args) > self.position
        given = args[self.position] if positional else kwargs.get(_SPARSE)
        if given is not None:
            raise ConvFusionError(
                f"a converted {type(module).__name__} takes no {_SPARSE}: its sparse mode is of "
                "the attention"
            )
        latents: Tensor = args[0] if args else kwargs["hidden_states"]
        carried = {"to_fractal": False, GRID: latents.new_empty((*self.grid(args, kwargs), 0))}
        if positional:
            return (*args[: self.position], carried, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, _SPARSE: carried}


@dataclass(frozen=True, eq=False)
class MatrixTurn:
    """Turns channels 2i and 2i + 1 of each head by a matrix, and rounds them to bfloat16.

    Kandinsky 5 rounds so in every dtype.

    Attributes:
        matrices: of each token and pair of channels, [N, d/2, 2, 2].
    """

    matrices: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """Queries or keys [B, h, N, d] as they are compared."""
        pairs = heads.unflatten(-1, (-1, 1, 2)).float()
        turned = (self.matrices.to(heads.device, torch.float32) * pairs).sum(-1)
        return turned.flatten(-2).to(torch.bfloat16).to(heads.dtype)

    def equals(self, other: Any) -> bool:
        """Whether another one turns every token alike."""
        return torch.equal(self.matrices, other.matrices)


class Kandinsky5(Family):
    """Kandinsky 5.0, without its sparse mode."""

    name = "kandinsky5"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"kandinsky5": {"*": VIDEO_KERNELS}}
    halo = VIDEO_HALO
    full_size = {
        "kandinsky5-2b": (
            _CLASS,
            {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168,
             "visual_cond": True},
        ),
        "kandinsky5-19b": (
            _CLASS,
            {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 4096, "ff_dim": 16384,
             "time_dim": 1024, "num_text_blocks": 4, "num_visual_blocks": 60,
             "axes_dims": (32, 48, 48), "visual_cond": True},
        ),
    }  # fmt: skip
    input_docs = {
        "hidden_states": "noisy latents of a video, [B, T, H, W, C]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "pooled_projections": "pooled output of the CLIP text encoder",
        "visual_rope_pos": "numbers of the frames, rows and columns of the tokens",
        "text_rope_pos": "numbers of the tokens of the text",
    }
    attention_classes = (Kandinsky5Attention,)
    frame_rate = 24
    frames = 31  # of 121 frames of a video
    rotary = True

    def list_sites(self, model: Denoiser) -> list[Site]:
        """Those of the video: the text has self-attentions of its own, which are left alone."""
        return [
            Site(
                path=f"visual_transformer_blocks.{number}.self_attention",
                channels=model.config.model_dim,
                heads=block.self_attention.num_heads,
                level=0,
                owner="",
                tap=f"visual_transformer_blocks.{number}.cross_attention_norm",
                rank=3,
            )
            for number, block in enumerate(model.visual_transformer_blocks)
        ]

    def carrier(self, model: Denoiser) -> SparseCarrier:
        position = argument_position(Kandinsky5Transformer3DModel, _SPARSE)
        return SparseCarrier(tuple(model.config.patch_size), position)

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MatrixTurn:
        """From the keyword that every block gives.

        Raises:
            ConvFusionError: the attention is sparse, or there is no embedding.
        """
        if GRID not in (kwargs.get(_SPARSE) or {GRID}):
            raise ConvFusionError(
                f"a Kandinsky 5 with {_SPARSE} does not attend to all of its tokens, which "
                "analysis and measured starts take it to do: call it without"
            )
        rotary = kwargs.get("rotary_emb")
        if rotary is None:
            raise without_rotary()
        return MatrixTurn(take_first(rotary).squeeze(1))

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size[-1]

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        """[B, T, H, W, C]; with frames to begin from, these and their mask are among C."""
        channels = model.config.in_visual_dim
        return (batch, *sides, 2 * channels + 1 if model.config.visual_cond else channels)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        return super().arrange_inputs(model, latents.movedim(1, -1), timesteps, conditioning)

    def unpack_latents(self, model: Denoiser, packed: Tensor, sides: Grid) -> Tensor:
        return packed.movedim(-1, 1)

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        raise ConvFusionError(  # `describe_further_needs` comes first
            "a Kandinsky 5 is told more than its prompts, which is not known here"
        )

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        config, count = model.config, words or QWEN_WORDS
        sides = [side // patch for side, patch in zip(values.sides, config.patch_size, strict=True)]
        return {
            "encoder_hidden_states": values(batch, count, config.in_text_dim),
            "pooled_projections": values(batch, config.in_text_dim2),
            "visual_rope_pos": tuple(torch.arange(side, device=values.device) for side in sides),
            "text_rope_pos": torch.arange(count, device=values.device),
        }

    def describe_further_needs(self, model: Denoiser) -> str:
        return "the places of its words, and the frames that it goes on from, if any, with a mask"

    def check_convert(self, model: Denoiser) -> None:
        kind = model.config.attention_type
        if kind != "regular":
            raise UnsupportedModelError(
                f"this {type(model).__name__} attends sparsely (attention_type {kind!r}), which no "
                "mixer does: only models whose attention is regular are converted"
            )


KANDINSKY5 = Kandinsky5()
