"""How the grid of the tokens travels to the self-attentions of a denoiser."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

from diffusers.models.attention import BasicTransformerBlock
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


_BLOCK_KEYWORDS = argument_position(BasicTransformerBlock, "cross_attention_kwargs")


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


@dataclass(frozen=True)
class BlockCarrier:
    """Sends the grid to blocks whose owner hands no keywords down to them.

    It goes with an argument that the owner passes on to each of its blocks as it is: as an
    attribute of that tensor, or in the place of a None. A hook of each block hands it to the
    attentions. So it comes again where gradient checkpointing calls a block again, with its own
    arguments, whatever has gone through the owner since.

    Attributes:
        patch: side of a patch; the grid is ⌊H/patch⌋ × ⌊W/patch⌋ of the owner's maps.
        argument: name of the argument, of the owner and of its blocks.
        in_owner, in_block: where it stands among their positional arguments.
        maps: name of the owner's first argument, maps […, H, W].
        blocks: path in the owner of the list of its blocks, `BasicTransformerBlock`s.
    """

    patch: int
    argument: str
    in_owner: int
    in_block: int
    maps: str = "hidden_states"
    blocks: str = "transformer_blocks"

    @classmethod
    def of(cls, owner: type[Any], patch: int, argument: str) -> BlockCarrier:
        """For owners of a class, whose `forward` takes the argument and passes it on."""
        in_block = argument_position(BasicTransformerBlock, argument)
        return cls(patch, argument, argument_position(owner, argument), in_block)

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        maps: Tensor = args[0] if args else kwargs[self.maps]
        return maps.shape[-2] // self.patch, maps.shape[-1] // self.patch

    def attach(self, owner: nn.Module) -> Handles:
        unpack = BlockUnpacker(self.argument, self.in_block)
        blocks: Any = owner.get_submodule(self.blocks)
        return Handles(
            (
                owner.register_forward_pre_hook(self, with_kwargs=True),
                *(block.register_forward_pre_hook(unpack, with_kwargs=True) for block in blocks),
            )
        )

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        maps: Tensor = args[0] if args else kwargs[self.maps]
        sent: Any = maps.new_empty((*self.grid(args, kwargs), 0))
        value = read_argument(args, kwargs, self.in_owner, self.argument)
        if value is not None:
            # A tensor of its own, since other owners with other grids get the same argument.
            grid, sent = sent, value.view(value.shape)
            sent.convfusion_grid = grid
        return replace_argument(args, kwargs, self.in_owner, self.argument, sent)


@dataclass(frozen=True)
class BlockUnpacker:
    """Forward pre-hook of a `BasicTransformerBlock`: hands the grid on as a keyword.

    Attributes:
        argument: the name of the argument that the grid comes with.
        position: where it stands among the positional arguments.
    """

    argument: str
    position: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        value = read_argument(args, kwargs, self.position, self.argument)
        if value is None:
            return None
        grid = getattr(value, "convfusion_grid", None)
        if grid is None:
            if value.shape[-1] != 0:
                return None
            grid = value
            args, kwargs = replace_argument(args, kwargs, self.position, self.argument, None)
        name, place = "cross_attention_kwargs", _BLOCK_KEYWORDS
        keywords = {**(read_argument(args, kwargs, place, name) or {}), GRID: grid}
        return replace_argument(args, kwargs, place, name, keywords)


def read_argument(args: tuple, kwargs: dict, position: int, name: str) -> Any:
    """An argument of a call, given by its position or by its name; None if it is not given."""
    return args[position] if len(args) > position else kwargs.get(name)


def replace_argument(
    args: tuple, kwargs: dict, position: int, name: str, value: Any
) -> tuple[tuple, dict]:
    """The arguments of a call with another value for one of them."""
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


@dataclass(frozen=True)
class NotedCarrier:
    """Sends the grid behind a rotary embedding that is made without seeing the latents.

    A hook of the owner notes it for the module that makes the embedding, in the same forward.

    Attributes:
        patch: sides of a patch along the axes of the grid.
        rope: path in the owner of the module that makes the embedding.
        latents: name of the owner's first argument, latents [B, C, …].
    """

    patch: tuple[int, ...]
    rope: str
    latents: str = "hidden_states"

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        latents: Tensor = args[0] if args else kwargs[self.latents]
        sides = latents.shape[-len(self.patch) :]
        return tuple(side // patch for side, patch in zip(sides, self.patch, strict=True))

    def attach(self, owner: nn.Module) -> Handles:
        return note_grid(self, owner, self.rope)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        latents: Tensor = args[0] if args else kwargs[self.latents]
        rope: Any = module.get_submodule(self.rope)
        rope.grid_of_call = latents.new_empty((*self.grid(args, kwargs), 0))


def note_grid(hook: Any, owner: nn.Module, rope: str) -> Handles:
    """Let a hook of the owner note the grid as `grid_of_call` of the rotary embedding at a path."""
    embedding = owner.get_submodule(rope)
    return Handles(
        (
            owner.register_forward_pre_hook(hook, with_kwargs=True),
            embedding.register_forward_hook(append_grid),
            owner.register_forward_hook(GridForgetter(rope), always_call=True),
        )
    )


@dataclass(frozen=True)
class GridForgetter:
    """Forward hook of an owner: what was noted is of this call, in which a rotary embedding may be
    made several times, as where samples are worked on one at a time.

    Attributes:
        rope: path in the owner of the module that makes the embedding.
    """

    rope: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        embedding: Any = module.get_submodule(self.rope)
        if "grid_of_call" in vars(embedding):
            del embedding.grid_of_call


@dataclass(frozen=True)
class Handles:
    """Several hooks that are taken off together."""

    each: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        for handle in self.each:
            handle.remove()


def append_grid(module: Any, args: tuple, output: Any) -> Any:
    """Forward hook of a rotary embedding: the grid that its owner's hook left goes behind it."""
    grid = getattr(module, "grid_of_call", None)
    if grid is None:  # the owner's `forward` was called directly, which skips its hook
        return output
    sent = grid if isinstance(grid, tuple) else (grid,)
    return (*output, *sent) if isinstance(output, tuple) else (output, *sent)


def read_grid(values: tuple) -> Tensor | None:
    """The grid among an attention's arguments: behind a rotary embedding, or in a dict."""
    for value in values:
        if isinstance(value, dict) and GRID in value:
            return value[GRID]
        if _carries_grid(value):
            return value[-1]
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
    if not _carries_grid(value):
        return value
    while _carries_grid(value):
        value = value[:-1]
    return value if len(value) > 1 else value[0]


def _carries_grid(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 1 and 0 in getattr(value[-1], "shape", ())[-1:]
