"""Models by name, from their configuration alone: on the meta device, without weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from convfusion import mini
from convfusion.errors import ConvFusionError
from convfusion.families import FAMILIES, Denoiser, component_names, family_of, supported_classes


def full_size_configs() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Class and configuration of the published denoisers that families know, by name."""
    return {name: full for family in FAMILIES.values() for name, full in family.full_size.items()}


def model_names() -> list[str]:
    """The names that `bench_model` knows."""
    return [*full_size_configs(), "mini"]


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

    @property
    def unit(self) -> int:
        """What the sides of its pictures are multiples of, in pixels."""
        return self.pixels_per_latent * family_of(self.denoiser).patch_size(self.denoiser)

    @property
    def largest(self) -> float:
        """The longest side of a picture that it can draw, in pixels."""
        side = family_of(self.denoiser).largest_side(self.denoiser)
        return math.inf if side is None else side * self.pixels_per_latent

    def draws(self, size: tuple[int, int]) -> bool:
        """Whether it can draw pictures of (height, width) pixels."""
        fits = not any(side % self.unit for side in size)
        return fits and self.unit <= min(size) and max(size) <= self.largest

    def latents(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the latents of pictures of (height, width) pixels.

        Raises:
            ConvFusionError: the model draws no pictures of this size.
        """
        height, width = size
        if max(size) > self.largest:
            raise ConvFusionError(
                f"{self.name} draws pictures of at most {self.largest} pixels along a side, not "
                f"{width}×{height}"
            )
        if not self.draws(size):
            raise ConvFusionError(
                f"{self.name} draws multiples of {self.unit} pixels along a side, not "
                f"{width}×{height}"
            )
        return height // self.pixels_per_latent, width // self.pixels_per_latent


def bench_model(name: str) -> BenchModel:
    """A published model by name, `mini`, or the pipeline in a folder.

    Raises:
        ConvFusionError: there is no such name or folder, or no adapter for its denoiser.
    """
    published = full_size_configs()
    if name in published:
        denoiser = denoiser_on_meta(*published[name])
        return BenchModel(name, denoiser, family_of(denoiser).latent_pixels(denoiser))
    if name == "mini":
        return _from_folder(name, mini.TEACHER)
    if (Path(name) / "model_index.json").is_file():
        return _from_folder(name, Path(name))
    raise ConvFusionError(
        f"{name!r} is neither a model, one of {', '.join(model_names())}, nor the folder of "
        "a pipeline"
    )


def denoiser_on_meta(kind: str, config: Mapping[str, Any]) -> Denoiser:
    """A diffusers denoiser of a supported class, without weights."""
    if kind not in supported_classes():
        raise ConvFusionError(
            f"{kind} is not supported; supported are {', '.join(supported_classes())}"
        )
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


def _from_folder(name: str, folder: Path) -> BenchModel:
    part = next((p for p in component_names() if (folder / p).is_dir()), None)
    if part is None:
        raise ConvFusionError(f"{folder} has no folder {' or '.join(component_names())}")
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
