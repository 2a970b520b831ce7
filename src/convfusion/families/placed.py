"""How the grid reaches sites whose model is told where each of its packed tokens lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.carrier import GRID, Handles, argument_position, note_grid, read_argument

_PLACES, _KEYWORDS = "img_ids", "joint_attention_kwargs"


@dataclass(frozen=True)
class PlacedCarrier:
    """Sends the grid of packed latents [B, N, C] behind the rotary embedding of every token.

    It is read once in each call from where the tokens lie, on the CPU, so that a model on a GPU
    waits for that. A caller can spare it, and compile the whole model without a break, by
    `joint_attention_kwargs={"grid": torch.empty(H, W, 0)}`.

    Pictures to go by follow in the same sequence, as in FLUX.1 Kontext. How many tokens R they have
    is sent too, as an empty tensor [R, 0] between the embedding and the grid.

    Attributes:
        places: position of `img_ids`, [N, 3], among the positional arguments: number of the
            picture, row and column.
        keywords: that of `joint_attention_kwargs`.
        rope: path in the owner of the module that makes the embedding.
    """

    places: int
    keywords: int
    rope: str = "pos_embed"

    @classmethod
    def of(cls, owner: type[Any]) -> Self:
        """For owners of a class, whose `forward` takes these arguments."""
        return cls(argument_position(owner, _PLACES), argument_position(owner, _KEYWORDS))

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(H, W) of the tokens, from the arguments of a call of the owner.

        Raises:
            ConvFusionError: nothing tells it, the tokens do not lie on a grid, or there are
                pictures to go by, which sites cannot tell from the text without this carrier.
        """
        *further, grid = self.read(args, kwargs)
        if further:
            raise ConvFusionError(
                "analysis and measured starts know no pictures to go by in the sequence of the "
                "one that is drawn: call the model without"
            )
        return tuple(grid.shape[:-1])

    def read(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """What is sent: the grid [H, W, 0], and before it [R, 0] of R tokens to go by.

        Raises:
            ConvFusionError: nothing tells it, or the tokens do not lie on a grid.
        """
        told = (read_argument(args, kwargs, self.keywords, _KEYWORDS) or {}).get(GRID)
        if told is not None:
            return (told,)
        places = read_argument(args, kwargs, self.places, _PLACES)
        if places is None or places.is_meta:
            raise ConvFusionError(
                "a converted model of packed latents must be told where its tokens lie (img_ids), "
                'or their grid (joint_attention_kwargs={"grid": torch.empty(H, W, 0)})'
            )
        grid = read_places(places[0] if places.ndim == 3 else places)
        rest = places.shape[-2] - math.prod(grid)
        sent = (places.new_empty(*grid, 0),)
        return (places.new_empty(rest, 0), *sent) if rest else sent

    def attach(self, owner: nn.Module) -> Handles:
        return note_grid(self, owner, self.rope)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        rope: Any = module.get_submodule(self.rope)
        rope.grid_of_call = self.read(args, kwargs)


def read_places(places: Tensor) -> tuple[int, int]:
    """(H, W) of the picture that comes first among tokens.

    The columns of its first row are counted. So numbers that their dtype has rounded, as bfloat16
    does above 256, are read right.

    Args:
        places: [N, 3]: number of the picture, row and column.

    Raises:
        ConvFusionError: they do not lie row by row on a grid.
    """
    read = places.detach().cpu()
    own = read[read[:, 0] == read[0, 0]]
    width = int((own[:, 1] == own[0, 1]).sum())
    height = len(own) // width
    if torch.equal(own, place_tokens(height, width, own[0].float()).to(own.dtype)):
        return height, width
    raise ConvFusionError(
        f"the {len(own)} tokens of the picture do not lie row by row on a grid, by their img_ids: "
        'where they are right, tell it with joint_attention_kwargs={"grid": torch.empty(H, W, 0)}'
    )


def place_tokens(height: int, width: int, first: Tensor | None = None) -> Tensor:
    """Where tokens lie that fill a grid row by row: [H·W, 3] in float32, on the CPU.

    Args:
        height, width: of the grid.
        first: where the first one lies, [3]; by default 0.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
    return places if first is None else places + first
