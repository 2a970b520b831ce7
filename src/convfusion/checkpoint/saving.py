"""What may be written: only what can be read back and computes the same then.

A component is rebuilt from its config when it is loaded, so it can have no tensors but those that
its config asks for. What other libraries have plugged in, such as a LoRA or an IP-Adapter, would be
lost without a word or make a folder that nobody can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.files import few


def check_component(name: str, part: Any, passed_over: tuple[str, ...] = ()) -> None:
    """Refuse a component of a pipeline that could not be read back as it is.

    Args:
        name: in the pipeline.
        part: a model, a tokenizer, a scheduler, or None.
        passed_over: how the names of its tensors begin that are written apart, or not at all.

    Raises:
        ConvFusionError: the component and what is wrong are named, and what helps.
    """
    if part is None:
        return
    if not hasattr(part, "save_pretrained"):
        raise ConvFusionError(f"{name} is a {type(part).__name__}, which cannot be saved")
    if not isinstance(part, nn.Module):
        return
    state = {k: v for k, v in part.state_dict().items() if not k.startswith(passed_over)}
    if any(".base_layer." in key or ".lora_" in key for key in state):
        raise ConvFusionError(
            f"a LoRA is loaded in {name}: pipe.fuse_lora() folds it in, and "
            "pipe.unload_lora_weights() takes it off; then save"
        )
    if empty := [key for key, tensor in state.items() if tensor.is_meta]:
        raise ConvFusionError(
            f"{name} has no values in {few(empty)}: after offloading, pipe.remove_all_hooks() "
            "brings them back; then save"
        )
    if odd := [key for key, tensor in state.items() if type(tensor) not in (Tensor, nn.Parameter)]:
        raise ConvFusionError(f"{name} is quantised, at {few(odd)}: save before quantising")
    planned = {k: v for k, v in _planned(name, part).items() if not k.startswith(passed_over)}
    if extra := state.keys() - planned.keys():
        raise ConvFusionError(
            f"{name} has tensors that its config does not ask for, {few(extra)}: take off what was "
            "plugged in, as with pipe.unload_ip_adapter() or pipe.unfuse_qkv_projections(); then "
            "save"
        )
    other = [key for key in planned if key not in state or state[key].shape != planned[key].shape]
    if other:
        raise ConvFusionError(
            f"{name} is not what its config describes, at {few(other)}: it could not be read back"
        )


def _planned(name: str, part: Any) -> dict[str, Tensor]:
    """The tensors, without values, that a model has when it is built from its config."""
    kind = type(part)
    try:
        with torch.device("meta"):
            made = kind.from_config(part.config) if hasattr(kind, "from_config") else None
            return (made or kind(part.config)).state_dict()
    except Exception as error:
        raise ConvFusionError(
            f"{name}, a {kind.__name__}, cannot be built again from its config, and so could not "
            "be read back"
        ) from error
