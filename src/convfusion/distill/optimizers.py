"""The optimisers that blocks can be trained with."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from convfusion.distill.config import DistillConfig
from convfusion.errors import ConvFusionError
from convfusion.imports import is_installed

# How many float32 numbers an optimiser keeps for each number of a parameter.
STATE_PER_NUMBER = {"adamw": 2.0, "adamw8bit": 0.5}


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: DistillConfig
) -> torch.optim.Optimizer:
    """The optimiser of the blocks, as `check_optimizer` has found it possible."""
    kind: Any = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        kind = import_module("bitsandbytes.optim").AdamW8bit
    return kind(
        list(parameters),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def check_optimizer(optimizer: str) -> None:
    """Raise a ConvFusionError if bitsandbytes is needed, and is not there."""
    if optimizer == "adamw8bit" and not is_installed("bitsandbytes"):
        raise ConvFusionError(
            "the optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes"
        )
