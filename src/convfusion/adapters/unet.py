"""UNet2DConditionModel: SD1.x, SD2.x, SDXL and everything of their layout."""

from __future__ import annotations

import re

from diffusers import Transformer2DModel

from convfusion.adapters.base import (
    Adapter,
    Denoiser,
    GridHook,
    Site,
    is_self_attention,
    register,
    transformer_blocks,
)
from convfusion.errors import UnsupportedModelError

_PLACE = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.")


def _level(path: str, levels: int) -> int:
    match = _PLACE.match(path)
    if match is None:
        raise UnsupportedModelError(f"{path} is in no down, mid or up block")
    kind, index = match.group(1), int(match.group(2) or 0)
    return {"down_blocks": index, "mid_block": levels - 1, "up_blocks": levels - 1 - index}[kind]


def _owner(path: str) -> str:
    return path.rsplit(".transformer_blocks.", 1)[0]


def _sites(model: Denoiser) -> list[Site]:
    """Those of its `Transformer2DModel`s; a motion module's attention is over time, not space."""
    levels = len(model.config.block_out_channels)
    return [
        Site(
            path=f"{path}.attn1",
            channels=block.attn1.query_dim,
            heads=block.attn1.heads,
            level=_level(path, levels),
            owner=_owner(path),
            tap=f"{path}.norm2" if block.attn2 is not None else f"{path}.norm3",
        )
        for path, block in transformer_blocks(model)
        if is_self_attention(block)
        and isinstance(model.get_submodule(_owner(path)), Transformer2DModel)
    ]


def _grid_hook(model: Denoiser) -> GridHook:
    return GridHook.of(Transformer2DModel, patch=1)  # on feature maps


UNET = register(Adapter("unet", "UNet2DConditionModel", _sites, _grid_hook))
