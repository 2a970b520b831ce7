"""Tiny random denoisers whose text and image share their attention, a function each."""

from typing import Any

from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PRXTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn


def sd35() -> SD3Transformer2DModel:
    """Of SD3.5 Medium: its first blocks also have an attention of the image alone."""
    return sharpen(
        SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            pos_embed_max_size=24,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
    )


def prx() -> PRXTransformer2DModel:
    model = PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    for block in model.blocks:  # zeros, with which no block changes anything
        nn.init.normal_(block.modulation.lin.weight, std=0.2)
    return sharpen(model)


def zimage(layers: int = 2) -> ZImageTransformer2DModel:
    """With padding that is not zero, unlike at the beginning of a training."""
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 2, 2],
        axes_lens=[600, 32, 32],
    )
    for padding in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(padding)
    return sharpen(model)


def qwenimage(num_layers: int = 2, **options: Any) -> QwenImageTransformer2DModel:
    return sharpen(
        QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=num_layers,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 2, 2),
            **options,
        )
    )


def lumina2() -> Lumina2Transformer2DModel:
    """With two heads to each head of keys and values."""
    return sharpen(
        Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=12,
        )
    )


def flux() -> FluxTransformer2DModel:
    """Of FLUX.1-dev, which is told a guidance scale."""
    return sharpen(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
    )


def chroma() -> ChromaTransformer2DModel:
    """With an approximator whose modulation matters, unlike at the beginning of a training."""
    model = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return sharpen(model)


def sharpen(model: nn.Module) -> nn.Module:
    """Let scores differ, so that it matters what attends to what."""
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            nn.init.constant_(parameter, 1.6)
    return model
