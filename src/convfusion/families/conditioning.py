"""What a denoiser is told beside latents and timestep, as a table of tensors by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convfusion.families.base import Denoiser


def flat(conditioning: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor | None]:
    """Conditioning by dotted name: `{"a": {"b": x}}` → `{"a.b": x}`. Each tensor is [B, …]."""
    found: dict[str, Tensor | None] = {}
    for name, value in conditioning.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def nested(conditioning: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The keyword arguments that `flat` flattened."""
    found: dict[str, Any] = {}
    for name, value in conditioning.items():
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return found


def placed(conditioning: Mapping[str, Tensor | None], like: Denoiser) -> dict[str, Any]:
    """Flat conditioning as a denoiser takes it: nested, on its device, numbers in its dtype."""
    moved = {
        name: tensor
        if tensor is None
        else tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        for name, tensor in conditioning.items()
    }
    return nested(moved)
