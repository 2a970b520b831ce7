"""How the grid reaches sites of packed latents that are told sides, or where each token lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.carrier import Handles, argument_position, note_grid, read_argument

_SIDES = ("num_frames", "height", "width")
_COORDINATES = "video_coords"


@dataclass(frozen=True)
class PackedCarrier:
    """Sends the grid of packed latents [B, N, C] behind the rotary embedding of every token.

    The owner is told their frames, height and width, or where each of its tokens lies. Where it is
    told both, and they differ, the places count: some pipelines give sides of 1 beside them.

    Attributes:
        sides: positions of `num_frames`, `height` and `width` among the positional arguments.
        coordinates: that of `video_coords`, [B, 3, N] or [B, 3, N, 2]: frame, row and column.
        rope: path in the owner of the module that makes the embedding.
    """

    sides: tuple[int, int, int]
    coordinates: int
    rope: str = "rope"

    @classmethod
    def of(cls, owner: type[Any]) -> PackedCarrier:
        """For owners of a class, whose `forward` takes these arguments."""
        frames, height, width = (argument_position(owner, name) for name in _SIDES)
        return cls((frames, height, width), argument_position(owner, _COORDINATES))

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(T, H, W) of the tokens, from the arguments of a call of the owner.

        Raises:
            ConvFusionError: nothing tells it, or the tokens do not lie on a grid.
        """
        tokens: Tensor = args[0] if args else kwargs["hidden_states"]
        sides = [
            read_argument(args, kwargs, place, name)
            for name, place in zip(_SIDES, self.sides, strict=True)
        ]
        coordinates = read_argument(args, kwargs, self.coordinates, _COORDINATES)
        told = None not in sides
        if told and (coordinates is None or math.prod(sides) == tokens.shape[1]):
            return tuple(sides)
        if coordinates is None:
            raise ConvFusionError(
                "a converted model of packed latents must be told num_frames, height and width, as "
                "its pipeline does"
            )
        return read_coordinates(coordinates)

    def attach(self, owner: nn.Module) -> Handles:
        return note_grid(self, owner, self.rope)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens: Tensor = args[0] if args else kwargs["hidden_states"]
        rope: Any = module.get_submodule(self.rope)
        rope.grid_of_call = tokens.new_empty((*self.grid(args, kwargs), 0))


def read_coordinates(coordinates: Tensor) -> tuple[int, int, int]:
    """(T, H, W) of tokens in the order of a video, from where they lie.

    Args:
        coordinates: [B, 3, N] or [B, 3, N, 2], in which the last axis has the bounds of a patch:
            frame, row and column, in any unit.

    Raises:
        ConvFusionError: they do not lie on a grid, one frame after the other and row by row, as
            where a pipeline adds the tokens of a further picture.
    """
    places = coordinates[0].reshape(3, coordinates.shape[2], -1)[..., 0]  # [3, N]
    frames, rows, _ = places
    with_first = frames == frames[0]
    of_frame, of_row = int(with_first.sum()), int((with_first & (rows == rows[0])).sum())
    count = coordinates.shape[2]
    grid = (count // of_frame, of_frame // of_row, of_row)
    if math.prod(grid) == count:
        maps = places.unflatten(1, grid)
        first = (maps[0, :, :1, :1], maps[1, :1, :, :1], maps[2, :1, :1, :])
        if all(torch.equal(a, b.expand(grid)) for a, b in zip(maps, first, strict=True)):
            return grid
    raise ConvFusionError(
        f"the {count} tokens do not lie on one grid of frames, rows and columns: a converted model "
        "takes no pictures or keyframes beside its video"
    )
