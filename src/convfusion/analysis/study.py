"""The analysis of a pipeline: sample, measure every layer, and put the numbers together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convfusion.analysis.capture import (
    Captured,
    attention_capture,
    check_prompts,
    choose_timesteps,
    counted_calls,
    visited_timesteps,
)
from convfusion.analysis.statistics import (
    HighPass,
    attention_score_mass,
    receptive_field,
    window_mass,
)
from convfusion.analysis.streaming import (
    AttentionSums,
    MapStatistics,
    Measure,
    measure_map,
    shown_queries,
    summarise,
    uniform_score_mass,
)
from convfusion.analysis.text_share import TextAnalysis, summarise_text
from convfusion.errors import ConvFusionError
from convfusion.families import (
    Denoiser,
    Site,
    denoiser_of,
    family_of,
    list_sites,
)
from convfusion.files import write_text
from convfusion.fingerprint import fingerprint
from convfusion.mixers.tokens import Grid
from convfusion.recording import run_denoiser

SCHEMA = "convfusion-analysis-1"
SINK_SHARE = 0.2  # a layer is flagged when sinks take this share of its attention
OTHER_FILTERS = tuple(HighPass(cutoff, order) for order in (1, 2, 4) for cutoff in (0.5, 1.0, 2.0))


@dataclass(frozen=True)
class AnalysisConfig:
    """How a pipeline is analysed.

    Attributes:
        steps: sampling steps.
        timesteps: where to look, among those that the scheduler visits; by default five.
        guidance: classifier-free guidance; both of its halves count.
        size: (height, width) of the pictures, by default the pipeline's own.
        frames: of videos, by default as many as the denoiser was trained on.
        share: of the high-frequency attention that the effective receptive field holds.
        measure: filter, queries, memory and seed.
        filters: further filters, tried on the mean map to show how far the ERF depends on them.
        batch_size: pictures drawn at once.
    """

    steps: int = 25
    timesteps: tuple[float, ...] | None = None
    guidance: float = 5.0
    size: tuple[int, int] | None = None
    share: float = 0.8
    measure: Measure = field(default_factory=Measure)
    filters: tuple[HighPass, ...] = OTHER_FILTERS
    batch_size: int = 4
    frames: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConvFusionError(f"share must lie between 0 and 1, not {self.share}")


@dataclass(frozen=True)
class FrameAnalysis:
    """What was found of the frames that a self-attention over videos looks at.

    Attributes:
        uniform_receptive_field: ERF in frames that uniform attention has on this grid.
        uniform_score_mass: share of the keys within 1, 3, 5, … frames round the query's, [T].
        profile: mean attention of the mean map to a key that lies 0, 1, 2, … frames away.
        within: share of the mean map within a window, `[T][D]`: of 1, 3, 5, … frames and of
            1, 3, 5, … tokens a side.
        uniform_within: the same of uniform attention.
    """

    uniform_receptive_field: int
    uniform_score_mass: list[float]
    profile: list[float]
    within: list[list[float]]
    uniform_within: list[list[float]]


@dataclass(frozen=True)
class SiteAnalysis:
    """What was found at one self-attention.

    Attributes:
        path: of the attention module.
        level: how often the latents were halved before it.
        grid: (H, W) or (T, H, W) of its tokens.
        queries: measured per map.
        uniform_receptive_field: ERF that uniform attention has on this grid: the K whose clipped
            windows cover `share` of the keys. An ERF near it is no locality.
        uniform_score_mass: the covered share itself at K = 1, 3, 5, …
        profile: mean attention of the mean map to a key at distance 0, 1, 2, … in space, which
            `mean.decay` is fitted to; 0 where the measured queries have no key.
        mean: statistics of the mean map, over heads, timesteps and pictures: the paper's A^l. It
            is what attention does whatever the picture.
        single: statistics of single maps (the mean over heads of one picture at one timestep),
            averaged. What depends on the content of the picture shows here.
        heads: as `single`, of each head.
        timesteps: as `single`, at each timestep.
        filters: ERF of the mean map under other filters.
        sinks: (row, column), or (frame, row, column), of tokens that are sinks in at least half of
            the single maps.
        artefact: sinks take so much of the attention that the ERF says nothing about locality.
        shown: the mean map `[S][H][W]` or `[S][T][H][W]` of a few queries, `shown_at` where they
            lie, as sinks do.
        frames: what is said of frames; None of a picture.
        text: what goes to a text that shares the attention, of which all else is left out; None
            where the image has it for itself.
    """

    path: str
    level: int
    grid: Grid
    queries: int
    uniform_receptive_field: int
    uniform_score_mass: list[float]
    profile: list[float]
    mean: MapStatistics
    single: MapStatistics
    heads: list[MapStatistics]
    timesteps: dict[float, MapStatistics]
    filters: list[dict[str, Any]]
    sinks: list[tuple[int, ...]]
    artefact: bool
    shown: list[Any]
    shown_at: list[tuple[int, ...]]
    frames: FrameAnalysis | None
    text: TextAnalysis | None


@dataclass(frozen=True)
class Analysis:
    """The analysis of one model, ready for `save`, plots and `recommend`.

    Attributes:
        model: classes of pipeline and denoiser.
        weights: fingerprint of the denoiser's weights.
        prompts: what was drawn.
        timesteps: where the attention was looked at.
        config: how.
        sites: every self-attention that ran.
    """

    model: str
    weights: str
    prompts: list[str]
    timesteps: list[float]
    config: AnalysisConfig
    sites: list[SiteAnalysis]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `docs/analysis.md` describes them."""
        return {"schema": SCHEMA, **_rounded(asdict(self))}

    def save(self, path: str | Path) -> None:
        write_text(Path(path), json.dumps(self.to_dict(), allow_nan=False) + "\n")


def analyze(
    pipe: Any,
    prompts: list[str],
    config: AnalysisConfig = AnalysisConfig(),
    *,
    on_call: Callable[[], None] | None = None,
) -> Analysis:
    """Analyse the self-attention of a pipeline while it draws the prompts.

    Args:
        pipe: a pipeline of pictures or videos that is not converted.
        prompts: what to draw; for DiT class names or numbers. Seeds are 0, 1, 2, …
        config: how.
        on_call: called after each call of the denoiser, for a progress bar.

    Raises:
        ConvFusionError: no prompts, a timestep that the scheduler does not visit, a model without
            self-attention or a converted one; or an attention map that is not finite.
    """
    check_prompts(prompts)
    model = denoiser_of(pipe)

    padding: list[Tensor] = []

    def draw(progress: bool | None = None) -> None:
        for start in range(0, len(prompts), config.batch_size):
            part = prompts[start : start + config.batch_size]
            padding[:] = find_padding(pipe, part)
            run_denoiser(
                pipe,
                part,
                seeds=list(range(start, start + len(part))),
                steps=config.steps,
                guidance=config.guidance,
                size=config.size,
                frames=config.frames,
                batch_size=config.batch_size,
                progress=progress,
            )

    visited = visited_timesteps(pipe, config.steps, lambda: draw(progress=False))
    timesteps = choose_timesteps(config.steps, config.timesteps, visited)
    capture = attention_capture(pipe, timesteps, config.measure, padding)
    with capture as seen, counted_calls(model, on_call):
        draw()
    return Analysis(
        model=f"{type(pipe).__name__} with {type(model).__name__}",
        weights=fingerprint(model),
        prompts=list(prompts),
        timesteps=timesteps,
        config=config,
        sites=site_analyses(model, seen, config),
    )


def find_padding(pipe: Any, prompts: list[str]) -> list[Tensor]:
    """Which tokens of the text are padding: of prompts, and of as many empty ones, if known."""
    family = family_of(denoiser_of(pipe))
    told = [family.find_padding(pipe, each) for each in (prompts, [""] * len(prompts))]
    return [each for each in told if each is not None]


def site_analyses(
    model: Denoiser, seen: dict[str, Captured], config: AnalysisConfig
) -> list[SiteAnalysis]:
    """The numbers of every site, from what was captured."""
    return [_analyse_site(s, seen[s.path], config) for s in list_sites(model) if s.path in seen]


def _analyse_site(site: Site, seen: Captured, config: AnalysisConfig) -> SiteAnalysis:
    grid, measure = seen.grid, config.measure
    parts = list(seen.by_timestep.values())
    singles = sum(parts[1:], start=parts[0])
    *heads, single = summarise(singles, config.share)
    mean_map = seen.mean_map / seen.maps
    sums = measure_map(mean_map, grid, measure)
    mean = summarise(sums, config.share)[0]
    uniform = uniform_score_mass(sums)
    uniform_field = receptive_field(uniform, config.share)
    assert uniform_field is not None  # the covered share is finite
    profile = sums.rings[0].sum(0) / sums.counts.sum(0).clamp(min=1)
    often = (singles.sinks[-1] >= singles.pictures / 2).nonzero().flatten().tolist()
    shown = shown_queries(grid)
    rows = torch.isin(measure.chosen_queries(grid), shown)
    return SiteAnalysis(
        path=site.path,
        level=site.level,
        grid=grid,
        queries=sums.queries,
        uniform_receptive_field=uniform_field,
        uniform_score_mass=uniform.tolist(),
        profile=profile.tolist(),
        mean=mean,
        single=single,
        heads=heads,
        timesteps={t: summarise(p, config.share)[-1] for t, p in seen.by_timestep.items()},
        filters=[_with_filter(mean_map, grid, config, other) for other in config.filters],
        sinks=[_place(token, grid) for token in often],
        artefact=single.sink_mass >= SINK_SHARE,
        shown=mean_map[rows.to(mean_map.device)].unflatten(1, grid).tolist(),
        shown_at=[_place(token, grid) for token in sorted(shown.tolist())],
        frames=_analyse_frames(sums, config.share) if len(grid) == 3 else None,
        text=summarise_text(seen.text, math.prod(grid)),
    )


def _analyse_frames(sums: AttentionSums, share: float) -> FrameAnalysis:
    """What the sums of a mean map say of frames."""
    counts, rings = sums.counts.sum(1), sums.rings[0]
    uniform = attention_score_mass(counts)
    field = receptive_field(uniform, share)
    assert field is not None  # the covered share is finite
    return FrameAnalysis(
        uniform_receptive_field=field,
        uniform_score_mass=uniform.tolist(),
        profile=(rings.sum(1) / counts.clamp(min=1)).tolist(),
        within=window_mass(rings).tolist(),
        uniform_within=window_mass(sums.counts).tolist(),
    )


def _place(token: int, grid: Grid) -> tuple[int, ...]:
    """(row, column) or (frame, row, column) of a token."""
    return tuple(int(each) for each in np.unravel_index(token, grid))


def _with_filter(
    mean_map: Tensor, grid: Grid, config: AnalysisConfig, other: HighPass
) -> dict[str, Any]:
    sums = measure_map(mean_map, grid, replace(config.measure, high_pass=other))
    field = summarise(sums, config.share)[0].receptive_field
    return {"cutoff": other.cutoff, "order": other.order, "receptive_field": field}


def build_untrained(pipe: Any, seed: int = 0) -> Denoiser:
    """A freshly initialised denoiser of the same shape, the control of an analysis.

    Draw with it in place of the trained one:
    `with swapped_denoiser(pipe, build_untrained(pipe)): …`.
    """
    model = denoiser_of(pipe)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = type(model).from_config(model.config)
    return fresh.to(model.device, model.dtype).eval()


def _rounded(value: Any) -> Any:
    """Numbers to six significant digits, all the way down: a report is no archive of rounding."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
