"""Distillation: train the blocks of a converted model to do what its own attention did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convfusion.imports import lazy

if TYPE_CHECKING:
    from convfusion.distill.config import DistillConfig, LossWeights
    from convfusion.distill.run import DistillResult, distill
    from convfusion.distill.task import DistillTask

# Loaded at first use: the command line reads the settings, and must not wait for torch.
_HOME = {
    "DistillConfig": "config",
    "LossWeights": "config",
    "DistillTask": "task",
    "DistillResult": "run",
    "distill": "run",
}
__all__ = sorted(_HOME)

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
