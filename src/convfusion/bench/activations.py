"""How much memory the tensors of one forward take at once, worked out without running it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(module: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> int:
    """The largest total size, in bytes, of the tensors that exist at once in a forward.

    Input and output count, and every tensor in between for as long as the code holds it; weights
    do not, nor what a kernel needs for itself. No graph is kept: it is the memory of drawing, not
    of training. Softmax attention is one operation without its N×N scores, as in the flash and
    memory-efficient kernels.

    Args:
        module: on the meta device; its dtype is that of the tokens.
        tokens: its first argument, on meta.
        args, kwargs: its further arguments.
    """
    alive = _Alive(module)
    alive.add(tokens)
    with torch.no_grad(), alive, _FusedAttention():
        module(tokens, *args, **kwargs)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Sums up the storages that are in use after each operation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weights = (*module.parameters(), *module.buffers())
        self.ignored = {StorageWeakRef(tensor.untyped_storage()) for tensor in weights}
        self.storages: dict[StorageWeakRef, int] = {}  # in bytes
        self.total = 0  # of all that are listed, some of which may be gone
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self.storages or reference in self.ignored:
            return
        self.storages[reference] = storage.nbytes()
        self.total += storage.nbytes()
        if self.total > self.peak:  # only then does it matter what is gone
            self.storages = {k: v for k, v in self.storages.items() if not k.expired()}
            self.total = sum(self.storages.values())
            self.peak = max(self.peak, self.total)


class _FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention as one operation, which on meta would be taken apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _output_alone(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _output_alone(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])
