"""Models by name, from their configuration alone: on the meta device, without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from convfusion import mini
from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, adapter_for, supported

# Class and configuration of the published denoisers, where they differ from diffusers' defaults.
FULL_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    "sd21": (
        "UNet2DConditionModel",
        {
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
    ),
    "dit": ("DiTTransformer2DModel", {"out_channels": 8}),
}
NAMES = (*FULL_SIZE, "mini")
PIXELS_PER_LATENT = 8  # along a side, in the autoencoders of all five


@dataclass(frozen=True)
class BenchModel:
    """A denoiser to count, and how its latents relate to pixels.

    Attributes:
        name: as asked for.
        denoiser: on the meta device, with its self-attention in place.
        pixels_per_latent: along a side.
    """

    name: str
    denoiser: Denoiser
    pixels_per_latent: int

    def latents(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the latents of pictures of (height, width) pixels.

        Raises:
            ConvFusionError: the model draws no pictures of this size.
        """
        unit = self.pixels_per_latent * adapter_for(self.denoiser).grid_hook(self.denoiser).patch
        height, width = size
        if min(size) < unit or height % unit or width % unit:
            raise ConvFusionError(
                f"{self.name} draws multiples of {unit} pixels along a side, not {width}×{height}"
            )
        return height // self.pixels_per_latent, width // self.pixels_per_latent


def bench_model(name: str) -> BenchModel:
    """A published model by name, `mini`, or the pipeline in a folder.

    Raises:
        ConvFusionError: there is no such name or folder, or no adapter for its denoiser.
    """
    if name in FULL_SIZE:
        return BenchModel(name, denoiser_on_meta(*FULL_SIZE[name]), PIXELS_PER_LATENT)
    if name == "mini":
        return _from_folder(name, mini.TEACHER)
    if (Path(name) / "model_index.json").is_file():
        return _from_folder(name, Path(name))
    raise ConvFusionError(
        f"{name!r} is neither a model, one of {', '.join(NAMES)}, nor the folder of a pipeline"
    )


def denoiser_on_meta(kind: str, config: dict[str, Any]) -> Denoiser:
    """A diffusers denoiser of a supported class, without weights."""
    if kind not in supported():
        raise ConvFusionError(f"{kind} is not supported; supported are {', '.join(supported())}")
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


def _from_folder(name: str, folder: Path) -> BenchModel:
    part = next((p for p in ("unet", "transformer") if (folder / p).is_dir()), None)
    if part is None:
        raise ConvFusionError(f"{folder} has no unet and no transformer")
    config, autoencoder = _read(folder / part), _read(folder / "vae")
    try:
        denoiser = denoiser_on_meta(config["_class_name"], config)
        halvings = len(autoencoder["block_out_channels"]) - 1
    except ConvFusionError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConvFusionError(f"{folder} holds no usable configuration: {error}") from None
    return BenchModel(name, denoiser, 2**halvings)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvFusionError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConvFusionError(f"{file} cannot be read: {error}") from None
