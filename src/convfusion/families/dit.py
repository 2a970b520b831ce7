"""Plain diffusion transformers: PixArtTransformer2DModel (α, Σ) and DiTTransformer2DModel."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from convfusion.families.base import (
    Adapter,
    Denoiser,
    GridHook,
    Site,
    is_self_attention,
    register,
    transformer_blocks,
)


def _sites(model: Denoiser) -> list[Site]:
    return [
        Site(
            path=f"{path}.attn1",
            channels=block.attn1.query_dim,
            heads=block.attn1.heads,
            level=0,
            owner="",
            # PixArt feeds the hidden state straight to attn2; DiT has none, and norm3 comes next.
            tap=f"{path}.attn2" if block.attn2 is not None else f"{path}.norm3",
        )
        for path, block in transformer_blocks(model)
        if is_self_attention(block)
    ]


def _pixart_hook(model: Denoiser) -> GridHook:
    return GridHook.of(PixArtTransformer2DModel, model.config.patch_size)


def _dit_hook(model: Denoiser) -> GridHook:
    return GridHook.of(DiTTransformer2DModel, model.config.patch_size)


PIXART = register(Adapter("pixart", "PixArtTransformer2DModel", _sites, _pixart_hook))
DIT = register(Adapter("dit", "DiTTransformer2DModel", _sites, _dit_hook))
