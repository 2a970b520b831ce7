"""The global random states of a process, as something to compare."""

import random

import numpy as np
import torch


def random_states():
    """Of Python, NumPy and PyTorch."""
    arrays = np.random.get_state()
    return (
        random.getstate(),
        (arrays[0], arrays[1].tolist(), *arrays[2:]),
        torch.random.get_rng_state().tolist(),
    )
