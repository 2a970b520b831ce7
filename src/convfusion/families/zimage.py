"""ZImageTransformer2DModel: Z-Image, whose image and caption are one sequence of tokens.

Each is padded to a multiple of 32 tokens, by a token that is learned and attended to. The image
comes first. All that is not a token of its grid counts as text: its padding, the caption, and what
pads shorter sequences of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.base import Denoiser, Family, Size
from convfusion.families.carrier import GridForgetter, Handles, read_argument, replace_argument
from convfusion.families.joint import (
    JOINT_HALO,
    JointLayout,
    close,
    mask_as_bias,
    project_image,
    split_heads_at,
    turn_pairs,
)
from convfusion.families.sites import Site, list_joint_sites
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid, Heads, JointTokens

WORDS = 512  # tokens that its text encoder reads at most
EXAMPLE_WORDS = 256  # of a long prompt, which is not padded
NATIVE_LATENTS = (128, 128)  # of 1024×1024 pixels
STEPS = 1000  # of its schedule
PATCH = 2  # which its forward goes by unless it is told another one

_CLASS = "ZImageTransformer2DModel"
_MODEL_PATCH = 7  # positions of arguments: `patch_size` of the model,
_TURN, _EMBEDDING = 2, 3  # `freqs_cis` and `adaln_input` of a block,
_FINAL_EMBEDDING = 1  # and `c` of the last layer


class ZImageLayout(JointLayout):
    """One sequence with the same layers for all tokens, those of the grid first."""

    processors = ("ZSingleStreamAttnProcessor",)

    def project(
        self,
        attention: Any,
        grid: Grid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        **_: Any,
    ) -> JointTokens:
        query, key, value = project_image(attention, hidden_states)
        if freqs_cis is not None:
            turn = freqs_cis[0] if isinstance(freqs_cis, tuple) else freqs_cis
            query, key = turn_pairs(query, turn), turn_pairs(key, turn)
        places = math.prod(grid)
        image, text = split_heads_at(places, Heads(query, key, value))
        seen = None if attention_mask is None else attention_mask[:, places:]
        return JointTokens(image, text, mask_as_bias(seen))

    def finish(
        self, attention: Any, image: Tensor, text: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return close(attention, torch.cat([image, text], dim=1))


@dataclass(frozen=True)
class ZImageCarrier:
    """Sends the grid with the embedding of the timestep, which every block of the image is given.

    A hook of the model notes it for the layer that makes the embedding. What that gives, [B, E], is
    seen as [B, E, H, W] from there on, which takes no memory. A hook of each block takes it off
    again, and puts the grid behind the rotary embedding.
    """

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the model.

        Raises:
            ConvFusionError: its samples have pictures of several sizes, or several pictures.
        """
        pictures: Any = args[0] if args else kwargs["x"]
        shapes = {each.shape if isinstance(each, Tensor) else None for each in pictures}
        first = next(iter(shapes))
        if len(shapes) != 1 or first is None or first[-3] != 1:
            raise ConvFusionError(
                "a converted Z-Image takes one picture for each sample, all of one size: draw "
                "others one by one, and revert the model where it goes by further pictures"
            )
        patch = read_argument(args, kwargs, _MODEL_PATCH, "patch_size") or PATCH
        return first[-2] // patch, first[-1] // patch

    def attach(self, owner: Any) -> Handles:
        blocks = (*owner.noise_refiner, *owner.layers)
        return Handles(
            (
                owner.register_forward_pre_hook(self, with_kwargs=True),
                owner.t_embedder.register_forward_hook(spread_embedding),
                owner.register_forward_hook(GridForgetter("t_embedder"), always_call=True),
                *(each.register_forward_pre_hook(unpack_grid, with_kwargs=True) for each in blocks),
                *(
                    each.register_forward_pre_hook(narrow_embedding, with_kwargs=True)
                    for each in owner.all_final_layer.values()
                ),
            )
        )

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        module.t_embedder.grid_of_call = self.grid(args, kwargs)


def spread_embedding(module: Any, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of what embeds a timestep: [B, E] as [B, E, H, W] of the grid that was noted."""
    grid = getattr(module, "grid_of_call", None)
    if grid is None:  # the model's `forward` was called directly, which skips its hook
        return output
    return output[:, :, None, None].expand(*output.shape, *grid)


def unpack_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a block: its own embedding, and the grid behind the rotary one."""
    spread = read_argument(args, kwargs, _EMBEDDING, "adaln_input")
    if spread is None or spread.ndim == 2:
        return None
    grid = spread.new_empty((*spread.shape[2:], 0))
    turn = read_argument(args, kwargs, _TURN, "freqs_cis")
    args, kwargs = replace_argument(args, kwargs, _TURN, "freqs_cis", (turn, grid))
    return replace_argument(args, kwargs, _EMBEDDING, "adaln_input", spread[:, :, 0, 0])


def narrow_embedding(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the last layer: its own embedding of the timestep."""
    spread = read_argument(args, kwargs, _FINAL_EMBEDDING, "c")
    if spread is None or spread.ndim == 2:
        return None
    return replace_argument(args, kwargs, _FINAL_EMBEDDING, "c", spread[:, :, 0, 0])


class ZImage(Family):
    """Z-Image and Z-Image-Turbo."""

    name = "zimage"
    classes = (_CLASS,)
    component = "transformer"
    latents = "x"
    times = "t"
    negated = True
    prompted = 0  # its pipeline puts the batch without the prompts behind the one with them
    presets = {"zimage": {"*": JOINT_HALO}}
    halo = JOINT_HALO
    full_size = {"z-image": (_CLASS, {})}
    input_docs = {
        "x": "noisy latents, each with one frame",
        "t": "1 − σ of every sample, for noise of deviation σ",
        "cap_feats": "hidden states of the text encoder of every caption",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_joint_sites(
            model, ("noise_refiner", "layers"), "attention", "ffn_norm1", _LAYOUT
        )

    def carrier(self, model: Denoiser) -> ZImageCarrier:
        return ZImageCarrier()

    def patch_size(self, model: Denoiser) -> int:
        return model.config.all_patch_size[0]

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        return (batch, model.config.in_channels, 1, *sides)

    def tell(self, timesteps: Tensor) -> Tensor:
        return (STEPS - timesteps) / STEPS

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With one frame, and captions cut to the tokens that they have."""
        told = dict(conditioning)
        seen = told.pop("cap_mask", None)
        if seen is not None:
            pairs = zip(told["cap_feats"], seen.sum(1).tolist(), strict=True)
            told["cap_feats"] = [states[: int(count)] for states, count in pairs]
        return super().arrange_inputs(model, latents[:, :, None], timesteps, told)

    def unpack_latents(self, model: Denoiser, packed: Any, sides: Grid) -> Tensor:
        """From one tensor for each sample, or all in one; those of its pipeline have no frame."""
        latents = torch.stack(list(packed))
        return latents[:, :, 0] if latents.ndim == 5 else latents

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        """Captions padded to one length, and a mask: `arrange_inputs` takes the padding off."""
        states, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=WORDS
        )
        padded = states[0].new_zeros(len(states), WORDS, states[0].shape[1])
        seen = torch.zeros(len(states), WORDS, device=padded.device)
        for number, each in enumerate(states):
            padded[number, : len(each)], seen[number, : len(each)] = each, 1
        return {"cap_feats": padded, "cap_mask": seen}

    def guide(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Its pipelines count from 0: they add so many times what the prompt makes of a picture."""
        told = dict(options)
        if told.get("guidance_scale") is not None:
            told["guidance_scale"] = max(0.0, told["guidance_scale"] - 1)
        return told

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        return {"cap_feats": values(batch, words or EXAMPLE_WORDS, model.config.cap_feat_dim)}


_LAYOUT = ZImageLayout()
Z_IMAGE = ZImage()
