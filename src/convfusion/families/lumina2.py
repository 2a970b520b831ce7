"""Lumina2Transformer2DModel: Lumina-Image 2.0, whose text and image are one sequence of tokens.

The text comes first, without its padding, so that the image begins at another place in every sample
of a batch. Some blocks before work on the image alone. Several heads share their keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from convfusion.families.base import TEXT_DOCS, Denoiser, Family, Size
from convfusion.families.joint import (
    JOINT_HALO,
    JointLayout,
    close,
    mask_as_bias,
    split_heads,
    split_heads_at,
    turn_pairs,
)
from convfusion.families.sites import Site, list_joint_sites
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid, Heads, JointTokens

WORDS = 256  # tokens that its text encoder reads
STEPS = 1000  # of its schedule

_CLASS = "Lumina2Transformer2DModel"
_EMBEDDINGS = slice(2, 4)  # of the image and of all tokens, among what the rotary module gives


class Lumina2Layout(JointLayout):
    """One sequence with the same layers for all tokens: text, image, and padding of the batch."""

    processors = ("Lumina2AttnProcessor2_0",)

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
        places = math.prod(grid)
        tokens = move_image(hidden_states, attention_mask, places, first=True)
        query = split_heads(attention.to_q(tokens), attention.heads, attention.norm_q)
        shared = attention.to_k.out_features // query.shape[-1]  # heads of keys and values
        key = split_heads(attention.to_k(tokens), shared, attention.norm_k)
        value = split_heads(attention.to_v(tokens), shared)
        if image_rotary_emb is not None:
            turn = image_rotary_emb[0] if isinstance(image_rotary_emb, tuple) else image_rotary_emb
            turn = move_image(turn, attention_mask, places, first=True)
            query, key = turn_pairs(query, turn), turn_pairs(key, turn)
        key, value = (each.repeat_interleave(attention.heads // shared, 1) for each in (key, value))
        image, text = split_heads_at(places, Heads(query, key, value))
        seen = None
        if attention_mask is not None:
            moved = move_image(attention_mask[..., None], attention_mask, places, first=True)
            seen = moved[:, places:, 0]
        return JointTokens(image, text, mask_as_bias(seen))

    def finish(
        self,
        attention: Any,
        image: Tensor,
        text: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        rows = torch.cat([image, text], dim=1)
        return close(attention, move_image(rows, attention_mask, image.shape[1], first=False))


def move_image(tokens: Tensor, mask: Tensor | None, places: int, *, first: bool) -> Tensor:
    """Bring the image of every sample from behind its text to the first places, or back.

    Args:
        tokens: [B, S, C]: the text, the image, and what pads the sequence; or the image first.
        mask: [B, S], true for text and image; None where nothing pads the sequences.
        places: tokens of the image.
        first: whether to bring it to the first places.
    """
    count = tokens.shape[1]
    if mask is None:
        start = count - places if first else places
        return torch.cat([tokens[:, start:], tokens[:, :start]], dim=1)
    words = mask.bool().sum(dim=1, keepdim=True) - places  # [B, 1]
    ahead, behind = (words, places) if first else (places, words)
    place = torch.arange(count, device=tokens.device)[None]
    order = torch.where(place < behind, place + ahead, place - behind)
    order = torch.where(place < places + words, order, place)
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))


@dataclass(frozen=True)
class Lumina2Carrier:
    """Sends the grid behind the rotary embeddings of the image, and of image and text.

    Attributes:
        patch: side of a patch.
    """

    patch: int

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        latents: Tensor = args[0] if args else kwargs["hidden_states"]
        return latents.shape[-2] // self.patch, latents.shape[-1] // self.patch

    def attach(self, owner: Any) -> RemovableHandle:
        return owner.rope_embedder.register_forward_hook(self)

    def __call__(self, module: Any, args: tuple, output: tuple) -> tuple:
        grid = output[0].new_empty((*self.grid(args, {}), 0))
        pairs = ((each, grid) for each in output[_EMBEDDINGS])
        return *output[: _EMBEDDINGS.start], *pairs, *output[_EMBEDDINGS.stop :]


class AllSeen(Tensor):
    """A mask [B, T] without values, of texts without padding, on the meta device.

    The model counts the tokens of each text on the CPU, to see where its image begins.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results are plain tensors

    def sum(self, dim: int) -> Tensor:  # type: ignore[override]
        """Tokens of each text."""
        return torch.full(self.shape[:1], self.shape[dim])


class Lumina2(Family):
    """Lumina-Image 2.0."""

    name = "lumina2"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    negated = True
    presets = {"lumina2": {"*": JOINT_HALO}}
    halo = JOINT_HALO
    full_size = {"lumina-image-2": (_CLASS, {"cap_feat_dim": 2304})}
    input_docs = {
        "hidden_states": "noisy latents",
        "timestep": "1 − σ of every sample, for noise of deviation σ",
        "encoder_hidden_states": TEXT_DOCS,
        "encoder_attention_mask": "1 for a token of the text, 0 for padding",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_joint_sites(model, ("noise_refiner", "layers"), "attn", "ffn_norm1", _LAYOUT)

    def carrier(self, model: Denoiser) -> Lumina2Carrier:
        return Lumina2Carrier(model.config.patch_size)

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def tell(self, timesteps: Tensor) -> Tensor:
        return 1 - timesteps / STEPS

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        states, seen, *_ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "encoder_attention_mask": seen}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        words = words or WORDS
        seen = torch.ones(batch, words, dtype=torch.bool, device=values.device)
        return {
            "encoder_hidden_states": values(batch, words, model.config.cap_feat_dim),
            "encoder_attention_mask": seen.as_subclass(AllSeen) if seen.is_meta else seen,
        }


_LAYOUT = Lumina2Layout()
LUMINA_2 = Lumina2()
