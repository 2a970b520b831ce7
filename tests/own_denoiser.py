"""A denoiser that no library knows: what somebody might train for themselves."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


class PatchTransformer2DModel(ModelMixin, ConfigMixin):
    """Transformer blocks on patches of the latents, which a Stable Diffusion pipeline can drive."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 4,
        width: int = 16,
        heads: int = 2,
        layers: int = 2,
        patch_size: int = 2,
        cross_attention_dim: int = 16,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width, heads, width // heads, cross_attention_dim=cross_attention_dim
            )
            for _ in range(layers)
        )
        self.unembed = nn.ConvTranspose2d(width, in_channels, patch_size, stride=patch_size)

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        maps = self.embed(sample)
        time = torch.as_tensor(timestep, device=sample.device, dtype=sample.dtype)
        tokens = maps.flatten(2).transpose(1, 2) + self.time(time.reshape(-1, 1, 1) / 1000)
        for block in self.blocks:
            tokens = block(
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
            )
        noise = self.unembed(tokens.transpose(1, 2).unflatten(2, maps.shape[-2:]))
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)
