"""The random states of a process, which belong to the caller."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random() -> Iterator[None]:
    """Put back the global random states of Python, NumPy and PyTorch (CPU and CUDA) at the end.

    For what draws from them although nothing that is drawn is kept, such as layers of another
    library whose weights are loaded afterwards.
    """
    own, arrays, tensors = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)
        torch.random.set_rng_state(tensors)
        if devices:
            torch.cuda.set_rng_state_all(devices)
