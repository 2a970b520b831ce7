"""Made-up inputs of a denoiser, which its family knows the shapes of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convfusion.mixers.tokens import Grid


class Values:
    """Makes fixed random values for a denoiser; on the meta device, shapes alone.

    Args:
        model: whose dtype floating-point values have.
        device: of the values.
        sides: of the latents that they go with: (height, width), of a video behind its frames.
    """

    def __init__(self, model: Any, device: torch.device | str, sides: Grid) -> None:
        self.device, self.dtype, self.sides = device, model.dtype, sides
        meta = str(device) == "meta"
        self._generator = None if meta else torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Normal values [*shape] in the model's dtype."""
        drawn_on = "meta" if self._generator is None else None
        made = torch.randn(*shape, generator=self._generator, device=drawn_on)
        return made.to(self.device, self.dtype)

    def filled(self, value: float, *shape: int) -> Tensor:
        """[*shape] of one value in the model's dtype."""
        return torch.full(shape, value, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """[*shape] of the integer 0, as class labels."""
        return torch.zeros(*shape, device=self.device, dtype=torch.long)
