"""The layers of a model as other libraries leave them: wrapped, quantised, cast or moved away.

What a layer stores is not always what it computes with. A hook may cast its weights before each
call (layerwise casting) or bring them from elsewhere (offloading); a quantised one has weights that
only it can read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.mixers.base import projections

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that layers compute in
_PLAIN_TENSORS = (nn.Parameter, Tensor)


def unwrapped(layer: nn.Module) -> nn.Module:
    """A layer without the LoRA around it, if there is one."""
    return getattr(layer, "base_layer", layer)


def diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers on a module itself, by name."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", {})


def check_projections(path: str, attention: Any) -> None:
    """Refuse an attention whose weights cannot be read as they are.

    Raises:
        UnsupportedModelError: its projections are quantised, layer by layer or weight by weight,
            or of another kind than PyTorch's.
    """
    layers = [unwrapped(layer) for layer in projections(attention)]
    kinds = {_kind(type(layer)) for layer in layers if type(layer) is not nn.Linear}
    if not kinds:
        weights = [layer.weight for layer in layers]
        kinds = {_kind(type(each)) for each in weights if type(each) not in _PLAIN_TENSORS}
    if kinds:
        raise UnsupportedModelError(
            f"{path} has projections of the kind {', '.join(sorted(kinds))}: convert before "
            "quantising"
        )


def check_at_hand(model: nn.Module, needed: Iterable[nn.Module]) -> None:
    """Refuse a model whose weights a hook brings from elsewhere, layer by layer or in groups.

    Args:
        model: whose hooks are looked at.
        needed: its modules whose weights are needed.

    Raises:
        ConvFusionError: it is offloaded in such a way. As a whole, as by
            `enable_model_cpu_offload`, is fine.
    """
    if any(_is_away(layer) for module in needed for layer in module.modules()):
        way = "sequential offload or a device_map"
    elif any("group_offloading" in diffusers_hooks(module) for module in model.modules()):
        way = "group offload"
    else:
        return
    raise ConvFusionError(
        f"the weights of this model are brought to where they are needed, part by part ({way}): "
        "convert it or load blocks first, and offload then"
    )


def compute_dtype(model: nn.Module, layer: Any) -> torch.dtype:
    """The dtype that a layer computes in, which may not be that of its weights.

    Raises:
        ConvFusionError: nothing says how weights of such a dtype are computed with.
    """
    dtype = layer.weight.dtype
    if (casting := diffusers_hooks(layer).get("layerwise_casting")) is not None:
        return casting.compute_dtype
    if dtype in FLOATS:
        return dtype
    for module in model.modules():  # the hook may sit on the model, or on a part of it
        if (casting := diffusers_hooks(module).get("layerwise_casting")) is not None:
            return casting.compute_dtype
    raise ConvFusionError(
        f"the weights of this model are {_name(dtype)}, which no layer computes in: load it in "
        "float16, bfloat16 or float32"
    )


def check_unhooked(model: nn.Module) -> None:
    """Refuse a model whose weights a hook must cast or bring before they can be computed with.

    Raises:
        ConvFusionError: it is cast layer by layer, or offloaded other than as a whole.
    """
    check_at_hand(model, [model])
    if any("layerwise_casting" in diffusers_hooks(module) for module in model.modules()):
        raise ConvFusionError(
            "a teacher shares its weights with the student, which here are cast before each call "
            "(layerwise casting): load the model in the dtype that it computes in"
        )


def check_blocks(mixers: Mapping[str, nn.Module]) -> None:
    """Refuse blocks whose tensors are not plainly their own, to be read or written.

    Args:
        mixers: by path of their site.

    Raises:
        ConvFusionError: a LoRA is around a layer of theirs, they are quantised, or offloaded.
    """
    for path, mixer in mixers.items():
        for name, layer in mixer.named_modules():
            where = f"{path}.mixer.{name}".rstrip(".")
            if unwrapped(layer) is not layer:
                raise ConvFusionError(
                    f"{where} has a LoRA or another adapter around it: fold it in with "
                    "pipe.fuse_lora(), then pipe.unload_lora_weights(), or unload it first"
                )
            if _is_away(layer):
                raise ConvFusionError(
                    f"the weights of {where} are offloaded: save and load blocks before, or take "
                    "the hooks off with pipe.remove_all_hooks()"
                )
        for name, tensor in mixer.state_dict().items():
            if not isinstance(tensor, Tensor) or type(tensor) not in _PLAIN_TENSORS:
                raise ConvFusionError(
                    f"{path}.mixer.{name} is quantised: save and load blocks before quantising"
                )


def check_floats(mixers: Mapping[str, nn.Module]) -> None:
    """Refuse to write blocks in a dtype that is not read.

    Raises:
        ConvFusionError: they are float8, as under layerwise casting, or another such dtype.
    """
    for path, mixer in mixers.items():
        for name, tensor in mixer.state_dict().items():
            if tensor.dtype not in FLOATS:
                raise ConvFusionError(
                    f"{path}.mixer.{name} is stored as {_name(tensor.dtype)}: save blocks before "
                    "layerwise casting is enabled, in float32, float16 or bfloat16"
                )


def check_untied(mixers: Mapping[str, nn.Module]) -> None:
    """Refuse to fill blocks that share a weight, where one would take the other's values.

    Raises:
        ConvFusionError: two of them share one.
    """
    seen: dict[int, str] = {}
    for path, mixer in mixers.items():
        for name, parameter in mixer.named_parameters():
            if seen.setdefault(id(parameter), path) != path:
                raise ConvFusionError(
                    f"{path}.mixer.{name} is shared with {seen[id(parameter)]}: revert the model "
                    "first, so that each block has weights of its own"
                )


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, each in memory of its own, as safetensors wants them."""
    separated, taken = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in taken
        taken.add(storage.data_ptr())
        separated[name] = tensor.contiguous() if alone else tensor.detach().clone().contiguous()
    return separated


def _is_away(layer: nn.Module) -> bool:
    """Whether accelerate keeps the weights of a layer elsewhere, and a stand-in on `meta` here."""
    return "_hf_hook" in vars(layer) and any(p.is_meta for p in layer.parameters(recurse=False))


def _kind(kind: type) -> str:
    return kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.{kind.__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
