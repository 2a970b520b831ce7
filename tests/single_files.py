"""A Stable Diffusion pipeline in one file, its tensors named as its makers named them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = (
    (r"down_blocks\.(\d+)", r"down.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"resnets", "block"),
    (r"(down|up)samplers\.0", r"\1sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
)


def single_file(pipe: Any) -> dict[str, Tensor]:
    """All tensors of a pipeline of SD1.x whose upper blocks all have attention, as one file."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        layers = pipe.unet.config.layers_per_block
        tensors["model.diffusion_model." + unet_name(name, layers)] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        projects = re.search(r"attentions.*\.(to_[qkv]|to_out\.0)\.weight", name)
        blocks = len(pipe.vae.config.block_out_channels)
        named = "first_stage_model." + vae_name(name, blocks)
        tensors[named] = tensor[..., None, None].contiguous() if projects else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        named = "text_model." + name.removeprefix("text_model.")
        tensors["cond_stage_model.transformer." + named] = tensor
    return tensors


def unet_name(name: str, layers: int) -> str:
    """The name of a tensor of a UNet with so many layers in a block."""
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    place, rest = name.split("_block", 1)
    if place == "mid":
        part, index, rest = re.fullmatch(r"\.(\w+)\.(\d)\.(.*)", rest).groups()
        found = f"middle_block.{2 * int(index) if part == 'resnets' else 1}"
    else:
        block, part, index, rest = re.fullmatch(r"s\.(\d+)\.(\w+)\.(\d+)\.(.*)", rest).groups()
        place = {"down": "input", "up": "output"}[place]
        first = int(block) * (layers + 1) + (place == "input")
        if part == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{kind}"
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.2.conv.{kind}"
        found = f"{place}_blocks.{first + int(index)}.{int(part == 'attentions')}"
    if part == "resnets":
        rest = f"{RESNET[rest.rpartition('.')[0]]}.{kind}"
    return f"{found}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """The name of a tensor of a VAE with so many blocks on each side."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    for ours, theirs in VAE:
        name = re.sub(ours, theirs, name)
    return name
