"""What the attention and the block of every site see from one point of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convfusion.analysis.capture import DenoiserCall
from convfusion.analysis.statistics import (
    DEFAULT_HIGH_PASS,
    attention_score_mass,
    chebyshev,
    high_pass,
    receptive_field,
)
from convfusion.app.studio import Studio
from convfusion.errors import ConvFusionError
from convfusion.families import Site, family_of
from convfusion.families.watch import attention_at
from convfusion.mixers.base import project_heads, score_scale
from convfusion.mixers.offsets import ring_sums
from convfusion.mixers.tokens import Grid, TokenSample
from convfusion.surgery import mixers_of

PROBES = 4  # directions of the output that a block's dependence is averaged over
SHARE = 0.8  # of the attention, that a receptive field holds
NOTHING = 1e-5  # a high-frequency part below this share of a map is rounding


@dataclass(frozen=True)
class Seen:
    """What a site was given: what a look needs of one call of the denoiser.

    Attributes:
        site: the self-attention.
        given: to the sample that sees the prompt.
    """

    site: Site
    given: TokenSample


@dataclass(frozen=True)
class Reach:
    """Where one query looks.

    Attributes:
        weights: [H][W], which sum to 1.
        score_mass: ASM, the share within K×K tokens around the query, at K = 1, 3, 5, …
        within: the smallest odd K whose window holds 0.8 of the weights.
        receptive_field: the same of Λ⁺, what the query looks at more than at its smooth
            surroundings (the ERF of `convfusion.analysis`); None of a smooth map.
    """

    weights: Tensor
    score_mass: list[float]
    within: int | None
    receptive_field: int | None


@dataclass(frozen=True)
class SiteView:
    """One site, looked at from a point.

    Attributes:
        path: of the attention.
        grid: (H, W) of its tokens.
        query: (row, column) of the token at the point.
        attention: where the attention looks, the mean over its heads.
        block: what the output of the block depends on; None where there is none, or where it
            depends on nothing.
        uniform: the ASM of uniform attention from this token, the share of the grid that a window
            covers.
        mixer: the settings of the block, or ''.
    """

    path: str
    grid: Grid
    query: tuple[int, int]
    attention: Reach
    block: Reach | None
    uniform: list[float]
    mixer: str


def watch_call(studio: Studio, call: DenoiserCall) -> list[Seen]:
    """The tokens of every site in one call of the teacher, which is repeated for that."""
    seen: list[Seen] = []
    prompted = family_of(studio.teacher).prompted

    def see(site: Site, attention: Any, given: TokenSample) -> None:
        last = prompted % len(given.tokens)
        seen.append(Seen(site, given.map(lambda each: each[last : last + 1].detach().clone())))

    studio.repeat(call, see)
    return seen


def look_from(studio: Studio, seen: Sequence[Seen], point: tuple[float, float]) -> list[SiteView]:
    """What every site sees from a point.

    Args:
        studio: whose teacher the tokens are of.
        seen: as `watch_call` gives it.
        point: (down, across) as shares of height and width, from 0 to 1.

    Raises:
        ConvFusionError: the point lies outside, or a map is not finite.
    """
    if not all(0 <= share <= 1 for share in point):
        raise ConvFusionError("this point lies outside of the picture")
    mixers = mixers_of(studio.pipe) if studio.has_blocks else {}
    views = []
    for each in seen:
        given, grid = each.given, each.given.grid
        row, column = (
            min(int(share * side), side - 1) for share, side in zip(point, grid, strict=True)
        )
        token = row * grid[1] + column
        attention = attention_at(studio.teacher, each.site)
        mixer = mixers.get(each.site.path)
        block = None if mixer is None else measure_dependence(mixer, given, token)
        distances = chebyshev(torch.tensor([token]), grid)
        views.append(
            SiteView(
                path=each.site.path,
                grid=grid,
                query=(row, column),
                attention=_reach(attend(attention, given, token), grid, token),
                block=None if block is None else _reach(block, grid, token),
                uniform=_score_mass(torch.ones_like(distances, dtype=torch.float32), distances),
                mixer="" if mixer is None else str(mixer.config),
            )
        )
    return views


@torch.no_grad()
def attend(attention: Any, given: TokenSample, token: int) -> Tensor:
    """softmax(scale·q·kᵀ) of one query, the mean over heads: tokens [1, N, C] → [N] on the CPU.

    Raises:
        ConvFusionError: it is not finite.
    """
    queries, keys, _ = project_heads(attention, given)
    scores = queries[0, :, token : token + 1] @ keys[0].transpose(1, 2) * score_scale(attention)
    return _checked(scores.softmax(-1).mean((0, 1)).float().cpu())


def measure_dependence(mixer: Any, given: TokenSample, token: int) -> Tensor | None:
    """How much the output of a mixer at one token depends on every token, as shares.

    The norm of the Jacobian ‖∂y_q/∂x_k‖_F of the output at the token q by the input at each token
    k, estimated from a few products vᵀ·J with random signs v, whose mean square is its square.
    Where text and image share the attention, x are the values of the image.

    Args:
        mixer: a token mixer.
        given: what it is given, of one sample.
        token: q.

    Returns:
        [N] on the CPU, of sum 1; None where the output depends on no token.

    Raises:
        ConvFusionError: it is not finite.
    """
    kind = next((p.dtype for p in mixer.parameters()), given.tokens.dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        tokens = given.tokens.to(kind, copy=True).requires_grad_()
        placed = given.map(lambda each: each.to(kind, copy=True)).with_tokens(tokens)
        output = mixer(placed.inputs, given.grid)[0, token]
        if not output.requires_grad:  # as of zeros
            return None
        squares = torch.zeros(tokens.shape[1], device=tokens.device)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            signs = signs.to(output.device, output.dtype)
            (slope,) = torch.autograd.grad(output, tokens, signs, retain_graph=True)
            squares += slope[0].float().square().sum(-1)
    norms = _checked(squares.sqrt().cpu())
    return norms / norms.sum() if norms.sum() > 0 else None


def _checked(weights: Tensor) -> Tensor:
    if not weights.isfinite().all():
        raise ConvFusionError("what a site sees is not finite (NaN or infinity)")
    return weights


def _reach(weights: Tensor, grid: Grid, token: int) -> Reach:
    distances = chebyshev(torch.tensor([token]), grid)
    high = high_pass(weights[None], grid, DEFAULT_HIGH_PASS.response(grid)).clamp(min=0)
    mass = _score_mass(weights[None], distances)
    some = high.sum() > NOTHING * weights.sum()
    field = receptive_field(torch.tensor(_score_mass(high, distances)), SHARE) if some else None
    return Reach(weights.view(grid), mass, receptive_field(torch.tensor(mass), SHARE), field)


def _score_mass(weights: Tensor, distances: Tensor) -> list[float]:
    """ASM of one query's weights [1, N] by the distances [1, N] of its keys.

    It ends where the last keys lie: a query near the middle has none farther away.
    """
    count = int(distances.max()) + 1
    return attention_score_mass(ring_sums(weights[None], distances, count)[0]).tolist()
