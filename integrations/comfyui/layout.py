"""Where the self-attentions of a ComfyUI model are, and what diffusers calls them.

ConvFusion names a site by its path in the diffusers model. ComfyUI has the same layers under the
names of the original checkpoints, and a map from one to the other. A skeleton, the diffusers model
without any values, tells the library everything else about the sites.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from convfusion.errors import UnsupportedModelError
from convfusion.families import Denoiser, list_sites
from convfusion.files import few

QUERY = ".attn1.to_q.weight"
_PLACE = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """One self-attention of a ComfyUI model.

    Attributes:
        path: what diffusers calls it, as in files of blocks.
        name: what ComfyUI calls it, from its model on.
        attention: the module.
    """

    path: str
    name: str
    attention: Any

    @property
    def forward(self) -> str:
        """Name of the method that a patch replaces."""
        return f"{self.name}.forward"


def find_places(model: Any) -> dict[str, Place]:
    """The self-attentions of a ComfyUI model by path, in the order of their modules.

    Args:
        model: a `ModelPatcher`, as MODEL sockets carry it.

    Raises:
        UnsupportedModelError: it is no SD1.x, SD2.x or SDXL.
    """
    import comfy.utils

    config = model.model.model_config.unet_config
    names = comfy.utils.unet_to_diffusers(config)
    found = {}
    for theirs, ours in names.items():
        if not theirs.endswith(QUERY):
            continue
        name = f"diffusion_model.{ours.removesuffix('.to_q.weight')}"
        block = model.model.get_submodule(name.rpartition(".")[0])
        if not block.disable_self_attn:
            path = theirs.removesuffix(".to_q.weight")
            found[path] = Place(path, name, block.attn1)
    if not found:
        kind = type(model.model.diffusion_model).__name__
        raise UnsupportedModelError(
            f"the model is a {kind}: ConvFusion's nodes know SD1.x, SD2.x and SDXL"
        )
    return found


def build_skeleton(model: Any, places: Mapping[str, Place]) -> Denoiser:
    """The diffusers UNet with the same self-attentions, on the meta device.

    Its dtype is the one that the ComfyUI model computes in.

    Raises:
        UnsupportedModelError: diffusers has no such UNet.
    """
    config = model.model.model_config.unet_config
    heads = {path: place.attention.heads for path, place in places.items()}
    with torch.device("meta"):
        skeleton: Denoiser = UNet2DConditionModel(**_diffusers_config(config, heads))
    own = {site.path: (site.channels, site.heads) for site in list_sites(skeleton)}
    theirs = {p: (each.attention.to_q.in_features, heads[p]) for p, each in places.items()}
    if own != theirs:
        odd = {path for path in own.keys() | theirs.keys() if own.get(path) != theirs.get(path)}
        raise UnsupportedModelError(
            f"this UNet is laid out as none that ConvFusion knows: it differs at {few(odd)}"
        )
    return nn.Module.to(skeleton, dtype=compute_dtype(model))  # diffusers' own warns, of nothing


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype that a ComfyUI model computes in, which may not be that of its weights."""
    return model.get_model_object("manual_cast_dtype") or model.model_dtype()


def _diffusers_config(config: Mapping[str, Any], heads: Mapping[str, int]) -> dict[str, Any]:
    """The configuration in diffusers' words; `heads` by path of a self-attention."""
    levels = len(config["channel_mult"])
    layers = list(config["num_res_blocks"])
    depths: dict[tuple[str, int, int], int] = defaultdict(int)  # transformer blocks in a row
    heads_of = [1] * levels
    for path, count in heads.items():
        match = _PLACE.match(path)
        assert match is not None, path
        side, block, layer = match[1], int(match[2] or 0), int(match[3])
        depths[side, block, layer] += 1
        heads_of[{"down_blocks": block, "up_blocks": levels - 1 - block}.get(side, -1)] = count
    down = [tuple(depths["down_blocks", i, j] for j in range(layers[i])) for i in range(levels)]
    up = [
        tuple(depths["up_blocks", i, j] for j in range(layers[levels - 1 - i] + 1))
        for i in range(levels)
    ]
    middle = depths["mid_block", 0, 0]
    last = down[-1] if any(down[-1]) else (middle,)  # whose first number is the middle's as well
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": tuple(config["model_channels"] * m for m in config["channel_mult"]),
        "layers_per_block": tuple(layers),
        "down_block_types": tuple(f"{_kind(rows)}DownBlock2D" for rows in down),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
        "up_block_types": tuple(f"{_kind(rows)}UpBlock2D" for rows in up),
        "transformer_layers_per_block": (*down[:-1], last),
        "reverse_transformer_layers_per_block": tuple(up),
        "attention_head_dim": tuple(heads_of),  # diffusers means the number of heads
        "cross_attention_dim": config["context_dim"],
        "use_linear_projection": config["use_linear_in_transformer"],
    }


def _kind(depths: tuple[int, ...]) -> str:
    return "CrossAttn" if any(depths) else ""
