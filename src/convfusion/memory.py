"""What a forward pass will hold at its worst moment, told from shapes before it runs.

The pass is done on the meta device, where tensors have shapes and no values. Every tensor that an
operation returns counts with its storage from then until nothing refers to it any more. Weights
count nothing. Attention counts as a fused kernel, which holds nothing but its output. What the
libraries hold inside of one operation (reordered copies in a convolution, say) is not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convfusion.adapters import denoiser_of
from convfusion.inputs import example_inputs

GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """The worst moment of a forward pass.

    Attributes:
        bytes: held by activations.
        where: path of the module that was at work.
    """

    bytes: int
    where: str

    @property
    def gib(self) -> float:
        return self.bytes / GIB


def denoiser_peak(
    pipe_or_model: Any, size: tuple[int, int], *, batch: int = 2, words: int = 77
) -> Peak:
    """The peak of a denoiser's activations, its inputs among them.

    Args:
        pipe_or_model: a pipeline or denoiser, converted or not.
        size: (height, width) of the latents.
        batch: samples at once; guidance draws each twice.
        words: tokens of the text.
    """
    model = denoiser_of(pipe_or_model)
    shapes = on_meta(model)
    return peak_of(
        shapes,
        lambda: shapes(**example_inputs(shapes, size, batch=batch, words=words, device="meta")),
    )


def decoder_peak(vae: Any, size: tuple[int, int]) -> Peak:
    """The peak of decoding latents of (height, width) in one piece."""
    shapes = on_meta(vae)
    latents = torch.empty(1, vae.config.latent_channels, *size, device="meta", dtype=vae.dtype)
    return peak_of(shapes, lambda: type(vae).decode(shapes, latents, return_dict=False))


def on_meta(model: nn.Module) -> Any:
    """A copy of a model without values; hooks and settings are kept."""
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    shapes |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, shapes)


def peak_of(model: nn.Module, call: Callable[[], Any]) -> Peak:
    """The peak of what a call of a model on the meta device makes."""
    ledger = _Ledger(model)
    hooks = [
        hook
        for path, module in model.named_modules()
        for hook in (
            module.register_forward_pre_hook(lambda *_, path=path: ledger.path.append(path)),
            module.register_forward_hook(lambda *_: ledger.path.pop() and None),
        )
    ]
    try:
        with torch.no_grad(), _FusedAttention(), ledger:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return Peak(ledger.peak, ledger.where)


class _FusedAttention(TorchFunctionMode):
    """Attention that makes its output and nothing else, as the fused kernels do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, _, value = (
                args[i] if i < len(args) else kwargs[name]
                for i, name in enumerate(("query", "key", "value"))
            )
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


class _Ledger(TorchDispatchMode):
    """The storages that are alive, without a model's weights, and how many bytes they held."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        weights = (*model.parameters(), *model.buffers())
        self._weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in weights}
        self.path: list[str] = []
        self.peak, self.where = 0, ""
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._weights:  # a view of a weight
                    self._alive[reference] = storage.nbytes()
        held = sum(self._alive.values())
        if held > self.peak:
            self.peak, self.where = held, self.path[-1] if self.path else ""
        return made
