"""The optimisers that blocks can be trained with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.distill.config import DistillConfig
from convfusion.errors import ConvFusionError
from convfusion.imports import is_installed


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: DistillConfig
) -> torch.optim.Optimizer:
    """The optimiser of the blocks, as `check_optimizer` has found it possible."""
    given = list(parameters)
    if config.optimizer == "muon":
        return MatrixMuon(given, config)
    kind: Any = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        kind = import_module("bitsandbytes.optim").AdamW8bit
    return kind(given, **_settings(config))


def check_optimizer(optimizer: str) -> None:
    """Raise a ConvFusionError if bitsandbytes or a newer PyTorch is needed, and is not there."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConvFusionError(
            f"the optimizer muon needs PyTorch 2.9 or newer, and this is {torch.__version__}"
        )
    if optimizer == "adamw8bit" and not is_installed("bitsandbytes"):
        raise ConvFusionError(
            "the optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes"
        )


def state_per_number(parameter: nn.Parameter, optimizer: str) -> float:
    """How many float32 numbers an optimiser keeps for each number of a parameter."""
    return {
        "adamw": 2.0,
        "adamw8bit": 0.5,
        "muon": 1.0 if _is_matrix(parameter) else 2.0,
    }[optimizer]


class MatrixMuon(torch.optim.Optimizer):
    """Muon for the projections, AdamW for depthwise kernels and biases, at one learning rate.

    Muon (https://kellerjordan.github.io/posts/muon) takes the nearest orthogonal matrix of the
    momentum as its step, which is defined for matrices alone. It is scaled to the size of AdamW's
    steps (Moonlight, arXiv 2502.16982), so that a rate suits both.
    """

    def __init__(self, parameters: list[nn.Parameter], config: DistillConfig) -> None:
        super().__init__(parameters, {"lr": config.learning_rate})
        matrices = [p for p in parameters if _is_matrix(p)]
        others = [p for p in parameters if not _is_matrix(p)]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            decay, rate = config.weight_decay, config.learning_rate
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        if others:
            self.parts.append(torch.optim.AdamW(others, **_settings(config)))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self._share()

    def _share(self) -> None:
        """Let the parts work on these groups and this state, which are saved and loaded as one."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:  # what `load_state_dict` calls
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Take a step with each part; a closure is called once, and its loss returned."""
        first, *others = self.parts
        loss = first.step(closure)
        for part in others:
            part.step()
        return loss


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2


def _settings(config: DistillConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
