"""Stand-in for ComfyUI's model around the UNet: noise levels, and the call of the denoiser."""

from types import SimpleNamespace

import torch
from torch import nn

from comfy.unet import UNetModel


class ModelSampling:
    """SD1.5's noise levels σ, of 1000 timesteps."""

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        self.levels = ((1 - alphas) / alphas).sqrt().float()

    def sigmas(self, steps):
        chosen = torch.linspace(999, 0, steps).round().long()
        return torch.cat([self.levels[chosen], torch.zeros(1)])

    def timestep(self, sigma):
        return (self.levels[None] - sigma[:, None]).abs().argmin(1)

    def percent_to_sigma(self, percent):
        if percent <= 0:
            return 999999999.9
        return 0.0 if percent >= 1 else self.levels[round((1 - percent) * 999)].item()


class BaseModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model_config = SimpleNamespace(unet_config=config)
        self.diffusion_model = UNetModel(config)
        self.model_sampling = ModelSampling()
        self.manual_cast_dtype = None

    def get_dtype(self):
        return self.diffusion_model.dtype

    def apply_model(self, x, t, c_crossattn=None, transformer_options={}, **more):  # noqa: B006
        sigma = t[:, None, None, None]
        xc = (x / (sigma**2 + 1).sqrt()).to(self.get_dtype())
        timestep = self.model_sampling.timestep(t)
        noise = self.diffusion_model(
            xc, timestep, context=c_crossattn, transformer_options=transformer_options
        )
        return x - noise.float() * sigma
