"""What can be said about an attention map: pure functions, each with its equation.

Maps are rows of attention, [..., Q, N]: Q queries that attend to N keys, which lie row by row on a
grid: (H, W), or (T, H, W) of a video. A picture is a video of one frame. Rings are sums over keys
by their distance from the query: in frames |Δframe|, and in space the Chebyshev distance
d = max(|Δrow|, |Δcolumn|), so that a K×K window holds the rings 0 … (K−1)/2, and one of K frames
those of |Δframe| ≤ (K−1)/2; near the border a window is clipped, since no keys lie outside. The
definitions of score mass, high-frequency part and effective receptive field follow Dong et al.,
"Can We Achieve Efficient Diffusion without Self-Attention?", ICCV 2025; those in time are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.mixers.tokens import Grid

SINK_FACTOR = 10.0  # a sink receives this many times what uniform attention gives a token,
SINK_BREADTH = 0.25  # from at least this share of the queries,
SINK_TOKENS = 0.01  # and sinks are few: at most this share of the tokens, but always one


@dataclass(frozen=True)
class HighPass:
    """A Butterworth high-pass filter over a query's map.

    Attributes:
        cutoff: frequency that is halved, in cycles per side of the grid (of √(H·W) tokens), and
            along the frames in cycles per video.
        order: steepness n.
    """

    cutoff: float = 1.0
    order: int = 2

    def __post_init__(self) -> None:
        if not self.cutoff > 0 or self.order < 1:
            raise ConvFusionError(
                f"a high-pass filter needs a cut-off above 0 and an order of at least 1, "
                f"not {self.cutoff} and {self.order}"
            )

    def response(self, grid: Grid) -> Tensor:
        """1 / (1 + (cutoff/f)^(2·order)), 0 at f = 0; [(T,) H, W//2 + 1] as `rfftn` orders it.

        f² = H·W·((u/H)² + (v/W)²) + w² for the wave of u cycles down, v across and w in time.
        """
        frames, height, width = as_video(grid)
        rows = torch.fft.fftfreq(height, dtype=torch.float64)
        columns = torch.fft.rfftfreq(width, dtype=torch.float64)
        within = math.sqrt(height * width) * torch.hypot(rows[:, None], columns[None])
        over = frames * torch.fft.fftfreq(frames, dtype=torch.float64)
        frequency = torch.hypot(over[:, None, None], within)
        # The constant wave has f = 0: (cutoff/0) is infinite, and its response 0.
        response = 1 / (1 + (self.cutoff / frequency) ** (2 * self.order))
        return response.reshape(*grid[:-1], -1)


DEFAULT_HIGH_PASS = HighPass()


@dataclass(frozen=True)
class DecayFit:
    """How attention at distance d falls off above a constant bias b.

    Attributes:
        exponent: s of the power law b + a·d^(−s).
        length: ℓ in tokens of the exponential b + a·exp(−d/ℓ).
        r2: share of the variance over the distances that each law explains; `quadratic` is the
            power law with s = 2, and `none` the bias alone, with 0.
        best: the law with the lowest Bayesian information criterion, which charges for each
            number that a law fits.
        terms: (b, a) of each law.
    """

    exponent: float
    length: float
    r2: dict[str, float]
    best: str
    terms: dict[str, tuple[float, float]]

    def value(self, law: str, distance: np.ndarray) -> np.ndarray:
        """What a law says at some distances."""
        shapes = {
            "power": distance**-self.exponent,
            "quadratic": distance**-2.0,
            "exponential": np.exp(-distance / self.length),
            "none": np.zeros_like(distance),
        }
        bias, amplitude = self.terms[law]
        return bias + amplitude * shapes[law]


def as_video(grid: Grid) -> tuple[int, int, int]:
    """(T, H, W) of a grid: a picture is a video of one frame."""
    frames, height, width = (1, *grid)[-3:]
    return frames, height, width


def name_grid(grid: Grid) -> str:
    """Such as 16×16, or 5×8×8 of a video."""
    return "×".join(map(str, grid))


def chebyshev(queries: Tensor, grid: Grid) -> Tensor:
    """max(|Δrow|, |Δcolumn|) from queries [Q], token indices, to every key: int64 [Q, N].

    Keys of other frames lie as far as those of the query's own.
    """
    frames, height, width = as_video(grid)
    keys = torch.arange(frames * height * width, device=queries.device)
    rows = (queries[:, None] // width % height - keys[None] // width % height).abs()
    columns = (queries[:, None] % width - keys[None] % width).abs()
    return torch.maximum(rows, columns)


def frame_distances(queries: Tensor, grid: Grid) -> Tensor:
    """|Δframe| from queries [Q] to every key: int64 [Q, N]; 0 on a picture."""
    frames, height, width = as_video(grid)
    keys = torch.arange(frames * height * width, device=queries.device)
    return (queries[:, None] // (height * width) - keys[None] // (height * width)).abs()


def rings(grid: Grid) -> int:
    """D, the number of distances in space from 0 to the largest on a grid."""
    return max(grid[-2:])


def windows(grid: Grid) -> list[int]:
    """The odd window sides K = 2·d + 1, one for each distance d in space on a grid."""
    return [2 * d + 1 for d in range(rings(grid))]


def attention_score_mass(ring_sums: Tensor) -> Tensor:
    """ASM(K) = Σ_{d < K/2} ring(d) / Σ_d ring(d), at K = 1, 3, 5, …; [..., D] → [..., D].

    The same holds of rings by frames, [..., T].

    Rings are summed over queries before they are normalised. The high-frequency part has both
    signs and sums to 0: give the rings of Λ⁺ = max(Λ, 0), the attention above its surroundings.
    """
    return ring_sums.cumsum(-1) / ring_sums.sum(-1, keepdim=True)


def window_mass(ring_sums: Tensor) -> Tensor:
    """Share of the attention within 1, 3, 5, … frames and 1, 3, 5, … tokens a side; [T, D] to it.

    Args:
        ring_sums: by distance in frames and in space, summed over queries.
    """
    return ring_sums.cumsum(0).cumsum(1) / ring_sums.sum()


def mass_within(score_mass: Tensor, window: int, grid: Grid) -> float:
    """ASM at one window side K. An even K holds what K − 1 does.

    Raises:
        ConvFusionError: K < 1, or the window is larger than the grid.
    """
    widest = rings(grid)
    if not 1 <= window <= widest:
        raise ConvFusionError(
            f"a window of {window} does not fit a grid of {name_grid(grid)}: "
            f"its side must lie between 1 and {widest}"
        )
    return score_mass[(window - 1) // 2].item()


def growth_exponent(score_mass: Tensor, grid: Grid) -> float | None:
    """s of ASM(K) ∝ K^s, by least squares on logarithms over K = 3, 5, … ≤ the shorter side.

    Uniform attention over a large grid has s = 2 (somewhat less where windows are clipped), and
    attention within the smallest window 0. None where the grid has fewer than two such K.
    """
    sides = [k for k in windows(grid) if 3 <= k <= min(grid[-2:])]
    masses = [score_mass[(k - 1) // 2].item() for k in sides]
    if len(sides) < 2 or min(masses) <= 0:
        return None
    return float(np.polyfit(np.log(sides), np.log(masses), 1)[0])


def receptive_field(score_mass: Tensor, share: float = 0.8) -> int | None:
    """ERF: the smallest odd K with ASM(K) ≥ share; None of a curve that is not finite.

    The effective receptive field of a layer is this of the high-frequency part at 0.8.
    """
    if not score_mass.isfinite().all():
        return None
    # The last value is 1 up to rounding, which must not decide.
    return 2 * int((score_mass >= share - 1e-9).int().argmax()) + 1


def high_pass(maps: Tensor, grid: Grid, response: Tensor) -> Tensor:
    """Λ = F⁻¹(response · F(A)) of each query's map: [..., N] → [..., N].

    The map is taken as periodic, as a discrete Fourier transform does. A − Λ is the low-frequency
    part; it keeps the sum of the map, 1.
    """
    axes = tuple(range(-len(grid), 0))
    spectrum = torch.fft.rfftn(maps.unflatten(-1, grid), dim=axes)
    spectrum *= response.to(maps.device, maps.dtype)
    return torch.fft.irfftn(spectrum, s=grid, dim=axes).flatten(-len(grid))


def entropy(maps: Tensor) -> Tensor:
    """−Σ_k A_k·ln A_k / ln N of each query's map: 1 is uniform, 0 one-hot; [..., N] → [...].

    1 on a single token.
    """
    tokens = maps.shape[-1]
    if tokens == 1:
        return torch.ones_like(maps[..., 0])
    return torch.special.entr(maps).sum(-1) / math.log(tokens)


def bias_share(squared_sum: Tensor, energy: Tensor, queries: int) -> Tensor:
    """Mean ⟨A_q, A_q'⟩ over pairs q ≠ q', over the mean of ‖A_q‖²: what all queries share.

    1 where every query has the same map (uniform attention, a sink): the map is a constant bias.
    0 where maps do not overlap. Taking pairs leaves no floor of 1/Q behind.

    Args:
        squared_sum: ‖Σ_q A_q‖².
        energy: Σ_q ‖A_q‖².
        queries: Q; the share is 1 of a single query.
    """
    if queries == 1:
        return torch.ones_like(energy)
    return (squared_sum - energy) / ((queries - 1) * energy)


def sink_tokens(column_sums: Tensor, column_squares: Tensor, queries: int) -> Tensor:
    """Which keys are sinks: few tokens that a large part of all queries attends to; bool [..., N].

    With a_k = Σ_q A_qk and e_k = Σ_q A_qk², a key is a sink if N·a_k/Q ≥ `SINK_FACTOR`, if the
    number of queries that effectively attend to it, a_k²/e_k, is at least `SINK_BREADTH`·Q, and if
    it is among the strongest `SINK_TOKENS`·N keys (at least one).
    """
    tokens = column_sums.shape[-1]
    strong = column_sums * tokens / queries >= SINK_FACTOR
    broad = column_sums.square() >= SINK_BREADTH * queries * column_squares
    few = max(1, int(tokens * SINK_TOKENS))
    least = column_sums.topk(few, dim=-1).values[..., -1:]
    return strong & broad & (column_sums >= least)


def fit_decay(profile: Tensor, grid: Grid) -> DecayFit | None:
    """Fit b + a·f(d), a ≥ 0, to the mean attention at d = 1 … ¾ of the shorter side.

    Least squares on the values themselves; s and ℓ by search. Beyond those distances only queries
    near the border have keys.

    Args:
        profile: [D], ring sums over the number of keys in each ring.

    Returns:
        The fit, or None with fewer than five distances.
    """
    last = fitted_distances(grid)
    if last < 5:
        return None
    values = profile[1 : last + 1].double().cpu().numpy()
    distance = np.arange(1.0, last + 1)
    exponents, lengths = np.arange(0.05, 8.0, 0.01), np.geomspace(0.2, 8 * last, 600)
    fits = {
        "power": _best(values, distance[None] ** -exponents[:, None], exponents),
        "quadratic": _best(values, distance[None] ** -2.0, np.array([2.0])),
        "exponential": _best(values, np.exp(-distance[None] / lengths[:, None]), lengths),
    }
    variance = np.square(values - values.mean()).sum()
    errors = {"none": variance, **{law: error for law, (error, *_) in fits.items()}}
    floor = max(1e-12 * np.square(values).sum(), 1e-300)  # below it is rounding
    count = len(values)
    scores = {
        law: count * math.log(max(error, floor) / count) + _FITTED[law] * math.log(count)
        for law, error in errors.items()
    }
    flat = variance <= floor
    return DecayFit(
        exponent=fits["power"][1],
        length=fits["exponential"][1],
        r2={law: 0.0 if flat else 1 - errors[law] / variance for law in _FITTED},
        best="none" if flat else min(scores, key=lambda law: scores[law]),
        terms={
            "none": (values.mean(), 0.0),
            **{law: terms for law, (_, _, terms) in fits.items()},
        },
    )


_FITTED = {"power": 3, "quadratic": 2, "exponential": 3, "none": 1}  # numbers in each law


def fitted_distances(grid: Grid) -> int:
    """The largest distance in space that `fit_decay` looks at."""
    return 3 * min(grid[-2:]) // 4


def _best(
    values: np.ndarray, shapes: np.ndarray, parameters: np.ndarray
) -> tuple[float, float, tuple[float, float]]:
    """The shape, of many, that b + a·shape fits best: its error, its parameter and (b, a)."""
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    amplitude = (centred @ values) / np.square(centred).sum(axis=1)
    amplitude = amplitude.clip(min=0)
    bias = values.mean() - amplitude * shapes.mean(axis=1)
    errors = np.square(values - bias[:, None] - amplitude[:, None] * shapes).sum(axis=1)
    best = int(errors.argmin())
    terms = (float(bias[best]), float(amplitude[best]))
    return float(errors[best]), float(parameters[best]), terms
