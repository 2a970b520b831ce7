"""What a denoiser takes beside latents and timestep, as a table of tensors by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convfusion.families.base import Denoiser


def flatten_conditioning(
    conditioning: Mapping[str, Any], prefix: str = ""
) -> dict[str, Tensor | None]:
    """Conditioning by dotted name: `{"a": {"b": x}}` → `{"a.b": x}`. Each tensor is [B, …]."""
    tensors: dict[str, Tensor | None] = {}
    for name, value in conditioning.items():
        if isinstance(value, Mapping):
            tensors |= flatten_conditioning(value, f"{prefix}{name}.")
        else:
            tensors[prefix + name] = value
    return tensors


def nest_conditioning(conditioning: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The keyword arguments that `flatten_conditioning` flattened."""
    arguments: dict[str, Any] = {}
    for name, value in conditioning.items():
        *parents, last = name.split(".")
        place = arguments
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return arguments


def place_conditioning(conditioning: Mapping[str, Tensor | None], like: Denoiser) -> dict[str, Any]:
    """Flat conditioning as a denoiser takes it: nested, on its device, numbers in its dtype."""
    moved = {
        name: tensor
        if tensor is None
        else tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        for name, tensor in conditioning.items()
    }
    return nest_conditioning(moved)
