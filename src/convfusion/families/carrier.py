"""How the grid of the tokens travels to the self-attentions of a denoiser."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convfusion.errors import ConvFusionError

GRID = "grid"  # the keyword under which a grid travels to a self-attention


class Carrier(Protocol):
    """Sends the grid along with every call of a site's owner, by hooks.

    The grid travels as the shape of an empty tensor, [H, W, 0] or [T, H, W, 0], so that gradient
    checkpointing replays it with the other arguments and `torch.compile` treats its sizes as
    dynamic.
    """

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """The grid of the tokens, from the arguments of a call of the owner."""

    def attach(self, owner: nn.Module) -> Any:
        """Hook an owner; the handle that is returned takes the hook off."""


@dataclass(frozen=True)
class KeywordCarrier:
    """Sends the grid in keywords which reach every attention of the owner.

    Attributes:
        patch: side of a patch; the grid is ⌊H/patch⌋ × ⌊W/patch⌋ of the owner's maps.
        position: where the keywords stand among the positional arguments.
        maps: name of the owner's first argument, maps [B, C, H, W].
        keywords: name of the argument that holds them.
    """

    patch: int
    position: int
    maps: str = "hidden_states"
    keywords: str = "cross_attention_kwargs"

    @classmethod
    def of(
        cls, owner: type[Any], patch: int, keywords: str = "cross_attention_kwargs"
    ) -> KeywordCarrier:
        """For owners of a class, whose `forward` takes such keywords."""
        first = list(inspect.signature(owner.forward).parameters)[1]
        return cls(patch, argument_position(owner, keywords), first, keywords)

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        maps: Tensor = args[0] if args else kwargs[self.maps]
        return maps.shape[-2] // self.patch, maps.shape[-1] // self.patch

    def attach(self, owner: nn.Module) -> RemovableHandle:
        return owner.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        maps: Tensor = args[0] if args else kwargs[self.maps]
        grid = maps.new_empty((*self.grid(args, kwargs), 0))
        if len(args) > self.position:
            extra = {**(args[self.position] or {}), GRID: grid}
            return (*args[: self.position], extra, *args[self.position + 1 :]), kwargs
        extra = {**(kwargs.get(self.keywords) or {}), GRID: grid}
        return args, {**kwargs, self.keywords: extra}


@dataclass(frozen=True)
class MapsCarrier:
    """Sends nothing: the owner is the self-attention itself, and sees maps [B, C, H, W]."""

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(H, W) of the maps, from the arguments of a call of the owner."""
        maps: Tensor = args[0] if args else kwargs["hidden_states"]
        return tuple(maps.shape[-2:])

    def attach(self, owner: nn.Module) -> MapsCarrier:
        return self

    def remove(self) -> None:
        """As the handle that it is: there is no hook to take off."""


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


@dataclass(frozen=True)
class RotaryCarrier:
    """Sends the grid behind the rotary embedding, (cos, sin), which reaches every self-attention.

    Attributes:
        patch: sides of a patch along the axes of the grid.
        latents: name of the owner's first argument, latents [B, C, T, H, W].
        rope: path in the owner of the module that makes the embedding.
    """

    patch: tuple[int, ...]
    latents: str = "hidden_states"
    rope: str = "rope"

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(T, H, W) of the tokens, from the arguments of a call of the owner."""
        latents: Tensor = args[0] if args else kwargs[self.latents]
        return self._part(latents)

    def attach(self, owner: nn.Module) -> RemovableHandle:
        return owner.get_submodule(self.rope).register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        return *output, output[0].new_empty((*self._part(args[0]), 0))

    def _part(self, latents: Tensor) -> tuple[int, ...]:
        sides = latents.shape[-len(self.patch) :]
        return tuple(side // patch for side, patch in zip(sides, self.patch, strict=True))


def read_grid(values: tuple) -> Tensor | None:
    """The grid among an attention's arguments: behind a rotary embedding, or in a dict."""
    for value in values:
        if isinstance(value, dict) and GRID in value:
            return value[GRID]
        if _carries_grid(value):
            return value[2]
    return None


def drop_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of every other attention in reach of a grid: it has no use for one."""
    return tuple(map(_strip, args)), without_grid(kwargs)


def without_grid(kwargs: dict) -> dict:
    """Keyword arguments of an attention as they would be without a grid."""
    return {key: _strip(value) for key, value in kwargs.items() if key != GRID}


def _strip(value: Any) -> Any:
    if isinstance(value, dict) and GRID in value:
        return None  # where a grid travels in a dict, there is no other reason for one
    return value[:2] if _carries_grid(value) else value


def _carries_grid(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and value[2].shape[-1] == 0
