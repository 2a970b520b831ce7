"""What names a set of weights: results and caches say by it which model they rest on."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(*modules: nn.Module, without: str | None = None) -> str:
    """The first 16 hex digits of SHA-256 over names, dtypes, shapes and values of every tensor.

    Equal weights have equal fingerprints on every device; another dtype has another one.

    Args:
        modules: in this order.
        without: leave out tensors with this in their name.

    Raises:
        NotImplementedError: a tensor is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if without is not None and without in name:
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]
