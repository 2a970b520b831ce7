"""Statistics of attention as it streams by: from queries and keys, never a whole N×N map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convfusion.analysis.places import Gathering, measure_gathering, read_gathering
from convfusion.analysis.statistics import (
    DEFAULT_HIGH_PASS,
    DecayFit,
    HighPass,
    as_video,
    attention_score_mass,
    bias_share,
    chebyshev,
    entropy,
    fit_decay,
    frame_distances,
    growth_exponent,
    high_pass,
    name_grid,
    receptive_field,
    rings,
    sink_tokens,
)
from convfusion.errors import ConvFusionError
from convfusion.mixers.offsets import precise, ring_sums
from convfusion.mixers.tokens import Grid

COPIES = 14  # live values per value of a map while a chunk is worked on, in units of float32
SHOWN = ((0.5, 0.5), (0.2, 0.2), (0.2, 0.75), (0.75, 0.35))  # of height and width
NOTHING = 1e-5  # a high-frequency part below this share of the map is rounding


@dataclass(frozen=True)
class Measure:
    """What is measured on each map.

    Attributes:
        high_pass: the filter that splits a map.
        queries: queries per map; all of a smaller grid.
        memory: MiB that the work on one chunk of queries may take. One query with the maps of all
            heads is the smallest chunk. The mean map of a site, queries × N × 4 bytes, comes on
            top.
        seed: of the choice of queries.
    """

    high_pass: HighPass = DEFAULT_HIGH_PASS
    queries: int = 256
    memory: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queries < 8 or self.memory < 1:
            raise ConvFusionError(
                "at least 8 queries and 1 MiB are needed, "
                f"not {self.queries} queries and {self.memory} MiB"
            )

    def chosen_queries(self, grid: Grid) -> Tensor:
        """Token indices in ascending order, the shown ones among them: the same for every map."""
        tokens = math.prod(grid)
        if tokens <= self.queries:
            return torch.arange(tokens)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.cat([shown_queries(grid), torch.randperm(tokens, generator=generator)])
        first = list(dict.fromkeys(order.tolist()))[: self.queries]
        return torch.tensor(sorted(first))

    def chunk(self, maps: int, tokens: int) -> int:
        """Queries whose `maps` maps of N tokens are worked on at once."""
        return max(1, self.memory * 2**20 // (4 * COPIES * maps * tokens))


def shown_queries(grid: Grid) -> Tensor:
    """The few queries whose maps are worth a look.

    Of a picture the middle, three others and the last token; of a video, whose maps are many
    pictures each, the middle of the middle frame.
    """
    frames, height, width = as_video(grid)
    if len(grid) == 3:
        return torch.tensor([((frames // 2) * height + height // 2) * width + width // 2])
    tokens = [int(r * height) * width + int(c * width) for r, c in SHOWN]
    return torch.tensor(list(dict.fromkeys([*tokens, height * width - 1])))


@dataclass
class AttentionSums:
    """Sums over maps of one grid and one set of queries, from which every statistic follows.

    M maps per query are kept apart, such as the heads. Sums of different pictures and timesteps
    add up. All are float64 on the CPU.
    """

    grid: Grid
    queries: int  # per picture
    pictures: int
    counts: (
        Tensor  # [T, D] keys at each distance in frames and in space, over one picture's queries
    )
    rings: Tensor  # [M, T, D] attention by distance
    high_rings: Tensor  # [M, T, D] Λ⁺ by distance
    magnitude_rings: Tensor  # [M, T, D] |Λ| by distance
    entropy: Tensor  # [M] sum over queries
    energy: Tensor  # [3, M] Σ‖A‖², Σ‖Λ‖², Σ‖A−Λ‖²
    overlap: Tensor  # [2, M] sum over pictures of `bias_share` of A and of A − Λ
    sink_mass: Tensor  # [M] sum over pictures of the share of attention that sinks take
    sinks: Tensor  # [M, N] number of pictures in which a token is a sink
    places: Tensor  # [4, M] sum over pictures of what `Gathering` says

    def __add__(self, other: AttentionSums) -> AttentionSums:
        if (self.grid, self.queries) != (other.grid, other.queries):
            raise ConvFusionError(
                f"maps on grids {self.grid} and {other.grid} cannot be averaged: "
                "analyse one picture size at a time"
            )
        kept = ("grid", "queries", "counts")
        names = [name for name in self.__dataclass_fields__ if name not in kept]
        sums: dict[str, Any] = {n: getattr(self, n) + getattr(other, n) for n in names}
        return AttentionSums(self.grid, self.queries, counts=self.counts, **sums)


@torch.no_grad()
def measure_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    grid: Grid,
    settings: Measure,
    mean_map: Tensor | None = None,
) -> AttentionSums:
    """The sums of one picture's attention softmax(scale·q·kᵀ): of each head and of their mean.

    The mean over heads counts as one more map, the last, since the entropy and the high-frequency
    part of a mean are not the means.

    Args:
        query: [h, N, d] of h heads; worked in float32 whatever its dtype.
        key: [h, N, d].
        scale: usually 1/√d.
        grid: (H, W) or (T, H, W) with N places.
        settings: what to measure.
        mean_map: float32 [Q, N], to which the mean over heads of the chosen queries is added.

    Raises:
        ConvFusionError: the grid has not N places, or an attention map is not finite.
    """
    heads, tokens = len(query), math.prod(grid)
    if query.shape != key.shape or query.shape[1] != tokens:
        raise ConvFusionError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not lie on a grid of "
            f"{name_grid(grid)}"
        )
    chosen = settings.chosen_queries(grid).to(query.device)
    key = key.float().transpose(1, 2)
    totals = _Totals(heads + 1, grid, settings.high_pass, query.device)
    chunk, done = settings.chunk(heads + 1, tokens), 0
    for part in chosen.split(chunk):
        maps = key.new_empty(heads + 1, len(part), tokens)
        with torch.autocast(key.device.type, enabled=False):
            torch.softmax(query[:, part].float() @ key * scale, dim=-1, out=maps[:-1])
        torch.mean(maps[:-1], dim=0, out=maps[-1])
        if mean_map is not None:
            mean_map[done : done + len(part)] += maps[-1]
        totals.add(maps, part)
        done += len(part)
    return totals.finish()


@torch.no_grad()
def measure_map(attention: Tensor, grid: Grid, settings: Measure) -> AttentionSums:
    """The sums of one map [Q, N] of the chosen queries, such as a mean map."""
    totals = _Totals(1, grid, settings.high_pass, attention.device)
    chunk, done = settings.chunk(1, attention.shape[1]), 0
    for part in settings.chosen_queries(grid).to(attention.device).split(chunk):
        totals.add(attention[None, done : done + len(part)].float().clone(), part)
        done += len(part)
    return totals.finish()


class _Totals:
    """The running sums of one picture, chunk by chunk."""

    def __init__(self, maps: int, grid: Grid, split: HighPass, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=precise(device), device=device)

        self.apart = (as_video(grid)[0], rings(grid))  # distances in frames, and in space
        count, tokens = math.prod(self.apart), math.prod(grid)
        self.grid, self.response, self.queries = grid, split.response(grid), 0
        self.counts = zeros(count)
        self.rings, self.high_rings = zeros(maps, count), zeros(maps, count)
        self.magnitude_rings = zeros(maps, count)
        self.late, self.to_first = 0, zeros(maps)
        self.entropy, self.energy = zeros(maps), zeros(3, maps)
        self.columns, self.squares = zeros(maps, tokens), zeros(maps, tokens)
        self.low_columns = zeros(maps, tokens)

    def add(self, maps: Tensor, queries: Tensor) -> None:
        """Take in the maps [M, Q, N] of some queries; they are overwritten."""
        count, frame = math.prod(self.apart), maps.shape[2] // self.apart[0]
        distances = frame_distances(queries, self.grid) * self.apart[1]
        distances += chebyshev(queries, self.grid)
        self.queries += len(queries)
        late = queries >= frame
        self.late += int(late.sum())
        self.to_first += maps[:, late, :frame].sum((1, 2))
        self.counts += torch.bincount(distances.flatten(), minlength=count)
        self.rings += ring_sums(maps, distances, count)
        self.entropy += entropy(maps).sum(1)
        self.columns += maps.sum(1)
        self.squares += maps.square().sum(1)
        self.energy[0] += maps.square().sum((1, 2))
        high = high_pass(maps, self.grid, self.response)
        self.energy[1] += high.square().sum((1, 2))
        maps -= high  # from here on the low-frequency part
        self.energy[2] += maps.square().sum((1, 2))
        self.low_columns += maps.sum(1)
        self.magnitude_rings += ring_sums(high.abs(), distances, count)
        self.high_rings += ring_sums(high.clamp_(min=0), distances, count)

    def finish(self) -> AttentionSums:
        if not self.rings.isfinite().all():
            raise ConvFusionError("an attention map is not finite (NaN or infinity)")
        squared = torch.stack([self.columns.square().sum(1), self.low_columns.square().sum(1)])
        sinks = sink_tokens(self.columns, self.squares, self.queries)
        places = measure_gathering(self.columns, self.queries, self.to_first, self.late, self.grid)
        sums = {
            "counts": self.counts.unflatten(-1, self.apart),
            "rings": self.rings.unflatten(-1, self.apart),
            "high_rings": self.high_rings.unflatten(-1, self.apart),
            "magnitude_rings": self.magnitude_rings.unflatten(-1, self.apart),
            "entropy": self.entropy,
            "energy": self.energy,
            "overlap": bias_share(squared, self.energy[[0, 2]], self.queries),
            "sink_mass": (self.columns * sinks).sum(1) / self.queries,
            "sinks": sinks.double(),
            "places": places,
        }
        on_cpu = {name: value.cpu().double() for name, value in sums.items()}
        return AttentionSums(self.grid, self.queries, pictures=1, **on_cpu)


@dataclass(frozen=True)
class FrameStatistics:
    """What the sums of one kind of map say about the frames of a video.

    Attributes:
        score_mass: share of the attention within K frames round the query's, [T] at K = 1, 3, …
        score_mass_high: the same of Λ⁺; None where there is no high-frequency part.
        receptive_field: ERF in frames, of Λ⁺.
    """

    score_mass: list[float]
    score_mass_high: list[float] | None
    receptive_field: int | None


@dataclass(frozen=True)
class MapStatistics:
    """What the sums of one kind of map say: statistics of single maps, averaged over them.

    Attributes:
        score_mass: ASM of the attention in space, in whatever frame, at K = 1, 3, 5, …, [D].
        score_mass_high: ASM of Λ⁺ = max(Λ, 0), what the query attends to more than to its smooth
            surroundings; None where there is no high-frequency part.
        growth: exponent of the raw curve, see `growth_exponent`.
        receptive_field: ERF in tokens, of Λ⁺; None with no high-frequency part.
        receptive_field_magnitude: the same of |Λ|. The negative trough that the filter leaves
            round every peak counts there, which makes narrow attention look wide.
        high_share: ‖Λ‖²/‖A‖².
        bias_share: what the maps of different queries have in common, 0 to 1.
        bias_share_low: the same of the low-frequency part.
        entropy: 0 one-hot, 1 uniform.
        decay: how the attention falls off with the distance, above a constant bias; or None.
        sink_mass: share of all attention that goes to sink tokens.
        gathering: how much more than others the first frame, corners and a few tokens receive.
        frames: what is said of frames; None of a picture.
    """

    score_mass: list[float]
    score_mass_high: list[float] | None
    growth: float | None
    receptive_field: int | None
    receptive_field_magnitude: int | None
    high_share: float
    bias_share: float
    bias_share_low: float
    entropy: float
    decay: DecayFit | None
    sink_mass: float
    gathering: Gathering
    frames: FrameStatistics | None


def summarise(sums: AttentionSums, share: float = 0.8) -> list[MapStatistics]:
    """The statistics of each of the M maps."""
    return [_summarise(sums, index, share) for index in range(len(sums.rings))]


def _summarise(sums: AttentionSums, index: int, share: float) -> MapStatistics:
    high, raw = sums.high_rings[index].sum(0), sums.rings[index].sum(0)
    some = bool(high.sum() > NOTHING * raw.sum())
    mass, mass_high = attention_score_mass(raw), attention_score_mass(high)
    mass_magnitude = attention_score_mass(sums.magnitude_rings[index].sum(0))
    energy = sums.energy[:, index]
    return MapStatistics(
        score_mass=mass.tolist(),
        score_mass_high=mass_high.tolist() if some else None,
        growth=growth_exponent(mass, sums.grid),
        receptive_field=receptive_field(mass_high, share) if some else None,
        receptive_field_magnitude=receptive_field(mass_magnitude, share) if some else None,
        high_share=(energy[1] / energy[0]).item(),
        bias_share=(sums.overlap[0, index] / sums.pictures).item(),
        bias_share_low=(sums.overlap[1, index] / sums.pictures).item(),
        entropy=(sums.entropy[index] / (sums.pictures * sums.queries)).item(),
        decay=fit_decay(raw / (sums.counts.sum(0) * sums.pictures).clamp(min=1), sums.grid),
        sink_mass=(sums.sink_mass[index] / sums.pictures).item(),
        gathering=read_gathering(sums.places[:, index] / sums.pictures, sums.grid),
        frames=_summarise_frames(sums, index, share, some) if len(sums.grid) == 3 else None,
    )


def _summarise_frames(sums: AttentionSums, index: int, share: float, some: bool) -> FrameStatistics:
    high = attention_score_mass(sums.high_rings[index].sum(1))
    return FrameStatistics(
        score_mass=attention_score_mass(sums.rings[index].sum(1)).tolist(),
        score_mass_high=high.tolist() if some else None,
        receptive_field=receptive_field(high, share) if some else None,
    )


def uniform_score_mass(sums: AttentionSums) -> Tensor:
    """ASM of uniform attention for the same queries: the covered share of the grid, [D]."""
    return attention_score_mass(sums.counts.sum(0))
