"""How the grid of the tokens travels to the self-attentions of a denoiser."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from convfusion.errors import ConvFusionError

GRID = "grid"  # the keyword under which a grid travels to a self-attention


class Carrier(Protocol):
    """Forward pre-hook of a site's owner that sends the grid along with the call.

    The grid travels as the shape of an empty tensor, [H, W, 0] or [T, H, W, 0], so that gradient
    checkpointing replays it with the other arguments and `torch.compile` treats its sizes as
    dynamic.
    """

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """The grid of the tokens, from the arguments of a call of the owner."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]: ...


@dataclass(frozen=True)
class KeywordCarrier:
    """Sends the grid in `cross_attention_kwargs`, which reach every attention of the owner.

    Attributes:
        patch: side of a patch; the grid is ⌊H/patch⌋ × ⌊W/patch⌋ of the owner's maps.
        position: where `cross_attention_kwargs` stands among the positional arguments.
        maps: name of the owner's first argument, maps [B, C, H, W].
    """

    patch: int
    position: int
    maps: str = "hidden_states"

    @classmethod
    def of(cls, owner: type[Any], patch: int) -> KeywordCarrier:
        """For owners of a class, whose `forward` takes `cross_attention_kwargs`."""
        first = list(inspect.signature(owner.forward).parameters)[1]
        return cls(patch, argument_position(owner, "cross_attention_kwargs"), first)

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        maps: Tensor = args[0] if args else kwargs[self.maps]
        return maps.shape[-2] // self.patch, maps.shape[-1] // self.patch

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        maps: Tensor = args[0] if args else kwargs[self.maps]
        grid = maps.new_empty((*self.grid(args, kwargs), 0))
        if len(args) > self.position:
            extra = {**(args[self.position] or {}), GRID: grid}
            return (*args[: self.position], extra, *args[self.position + 1 :]), kwargs
        extra = {**(kwargs.get("cross_attention_kwargs") or {}), GRID: grid}
        return args, {**kwargs, "cross_attention_kwargs": extra}


def argument_position(kind: type[Any], name: str) -> int:
    """The position of an argument of a module class's `forward`, counted without `self`.

    Raises:
        ConvFusionError: it takes no such argument.
    """
    names = list(inspect.signature(kind.forward).parameters)
    if name not in names:
        raise ConvFusionError(
            f"the forward of a {kind.__name__} takes no {name}: its family needs its own carrier"
        )
    return names.index(name) - 1


def drop_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of every other attention in reach of a grid: it has no use for one."""
    return args, {key: value for key, value in kwargs.items() if key != GRID}
