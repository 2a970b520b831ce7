"""PRXTransformer2DModel, whose text is attended to by the image, and attends to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_prx import PRXAttention, apply_rope
from torch import Tensor

from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import NotedCarrier
from convfusion.families.joint import JOINT_HALO, JointLayout, close, mask_as_bias, split_heads
from convfusion.families.sites import Site, list_joint_sites
from convfusion.families.values import Values
from convfusion.mixers.tokens import Grid, Heads, JointTokens

WORDS = 256  # tokens that its text encoder reads
NATIVE_LATENTS = (64, 64)  # of 512×512 pixels
STEPS = 1000  # of its scheduler, of which the model is told the part

_CLASS = "PRXTransformer2DModel"


class PRXLayout(JointLayout):
    """One layer for queries, keys and values of the image, one for keys and values of the text."""

    processors = ("PRXAttnProcessor2_0",)

    def project(
        self,
        attention: Any,
        grid: Grid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **_: Any,
    ) -> JointTokens:
        heads = attention.heads
        query, key, value = attention.img_qkv_proj(hidden_states).chunk(3, dim=-1)
        text_key, text_value = attention.txt_kv_proj(encoder_hidden_states).chunk(2, dim=-1)
        query = split_heads(query, heads, attention.norm_q)
        key = split_heads(key, heads, attention.norm_k)
        if image_rotary_emb is not None:
            turn = image_rotary_emb[0] if isinstance(image_rotary_emb, tuple) else image_rotary_emb
            query, key = apply_rope(query, turn), apply_rope(key, turn)
        image = Heads(query, key, split_heads(value, heads))
        text = Heads(
            query[:, :, :0],
            split_heads(text_key, heads, attention.norm_added_k),
            split_heads(text_value, heads),
        )
        return JointTokens(image, text, mask_as_bias(attention_mask))

    def finish(
        self, attention: Any, image: Tensor, text: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return close(attention, image)


class PRX(Family):
    """Photoroom's PRX."""

    name = "prx"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"prx": {"*": JOINT_HALO}}
    halo = JOINT_HALO
    full_size = {"prx-1.2b": (_CLASS, {})}
    input_docs = {
        "hidden_states": "noisy latents",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "attention_mask": "true where there is a token of the text",
    }
    attention_classes = (PRXAttention,)

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_joint_sites(
            model, ("blocks",), "attention", "post_attention_layernorm", _LAYOUT
        )

    def carrier(self, model: Denoiser) -> NotedCarrier:
        patch = model.config.patch_size
        return NotedCarrier((patch, patch), "pe_embedder")

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def tell(self, timesteps: Tensor) -> Tensor:
        return timesteps / STEPS

    def native_latents(self, model: Denoiser) -> Size:
        return NATIVE_LATENTS

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, mask, *_ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "attention_mask": mask}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        count = words or WORDS
        mask = torch.ones(batch, count, dtype=torch.bool, device=values.device)
        states = values(batch, count, model.config.context_in_dim)
        return {"encoder_hidden_states": states, "attention_mask": mask}


_LAYOUT = PRXLayout()
PRX_IMAGE = PRX()
