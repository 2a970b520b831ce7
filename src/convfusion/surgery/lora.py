"""What other libraries have put into a model, where conversion must take notice of it.

A LoRA wraps the linear layers that it targets (peft calls the wrapped one `base_layer`). On a
converted site the projections of the self-attention are not called any more, so neither is what a
LoRA adds to them. The rest of the LoRA works as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from convfusion.families import Denoiser, list_sites


def projections(attention: Any) -> Iterator[nn.Module]:
    """The linear layers of an attention as they are now, wrapped by a LoRA or not."""
    yield from (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])


def unwrapped(layer: nn.Module) -> nn.Module:
    """A layer without the LoRA around it, if there is one."""
    return getattr(layer, "base_layer", layer)


def tell_idle_lora(model: Denoiser, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a converted denoiser: warn once of a LoRA that converted sites pass by.

    It looks only when the names of the adapters have changed since it last did.
    """
    if torch.compiler.is_compiling():
        return
    adapters = tuple(sorted(getattr(model, "peft_config", None) or {}))
    if adapters == model._convfusion_adapters:
        return
    model._convfusion_adapters = adapters
    if idle := idle_lora(model):
        warnings.warn(
            f"the LoRA {', '.join(adapters)} has no effect on {len(idle)} converted "
            f"self-attentions, {', '.join(idle)}; its other layers apply. To have all of it, "
            "fold it in first: pipe.fuse_lora(), pipe.unload_lora_weights(), convert, distil",
            stacklevel=2,
        )


def idle_lora(model: Denoiser) -> list[str]:
    """The converted self-attentions whose unused projections carry a LoRA, by path."""
    found = []
    for site in list_sites(model):
        attention = model.get_submodule(site.path)
        passed_by = type(attention) is not Attention and hasattr(attention, "to_q")
        if passed_by and any(unwrapped(layer) is not layer for layer in projections(attention)):
            found.append(site.path)
    return found
