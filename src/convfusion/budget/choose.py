"""Which mixer stands at which site, so that the sum of errors is least within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convfusion.budget.allocation import Allocation, Budget, SiteChoice, parse_budget
from convfusion.budget.candidates import (
    REACHES,
    Candidate,
    Shape,
    count_operations,
    keep_undominated,
    list_candidates,
    list_shared,
    list_uniform,
    set_halo,
)
from convfusion.budget.knapsack import Front, find_front
from convfusion.budget.moments import Moments, SiteMoments
from convfusion.budget.seconds import time_candidates
from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, Site, denoiser_of, family_of, list_sites, native_latents
from convfusion.families import site_grid as grid_of
from convfusion.fingerprint import fingerprint
from convfusion.mixers.tokens import Grid
from convfusion.operations import JointCounter, attention_operations
from convfusion.surgery import mixers_of

DEAREST = [  # that say how dear a site is
    set_halo(reach, *ratios) for reach in REACHES.values() for ratios in ((0.25, 0.5), (1.0, 1.0))
]
BY_MOMENTS = "predicted from the moments that were measured, before any training"
BY_OPERATIONS = (
    "nothing was measured, so that all sites have halo blocks of the same ranks, the largest "
    "within the budget: --measure or --moments puts them where they matter"
)
OF_IMAGE = (
    " (where text and image share an attention, only what goes from image to image can be replaced)"
)


@dataclass(frozen=True)
class Place:
    """A site, and what may stand there.

    Attributes:
        site: of the model.
        shape: of its tokens at the size that is planned for.
        attention: operations of its attention.
        options: (candidate, operations) that no other one beats, the cheapest first.
        sensitivity: ε-error for each unit of imitation error.
    """

    site: Site
    shape: Shape
    attention: int
    options: Sequence[tuple[Candidate, float]]
    sensitivity: float


def choose_mixers(
    pipe_or_model: Any,
    budget: str | Budget,
    *,
    moments: Moments | None = None,
    size: Grid | None = None,
    keep: int = 0,
    batch: int = 2,
) -> Allocation:
    """Choose what stands at each self-attention so that the sum of errors is least.

    At every site the attention, a ΔConvBlock, the mean token, or a halo block of some window, cells
    and ranks may stand. The error of the whole is taken as the sum over the sites of their
    imitation error times their sensitivity, and the best choice by it is found by a knapsack.
    Nothing is changed: `convert(model, allocation.config())` does what was chosen.

    Args:
        pipe_or_model: not converted; on the meta device too, for a budget of operations.
        budget: `"4x"` for 4 times fewer operations of all self-attentions together; or `"0.8s"`
            for so many seconds of all of them in one call of the denoiser, measured here. Of those
            that text and image share, projections and what involves the text count, and stay.
        moments: of this model. Without them all sites have halo blocks of the same ranks, the
            largest whose operations are within the budget; where text and image share attentions,
            and ranks are full, they see equally far there.
        size: (height, width) of the latents that it is planned for, of a video with the frames
            before them; by default that of the moments, or the model's own.
        keep: keep the attention at so many of the sites, those that are dearest to replace.
        batch: samples in a call of which seconds are measured.

    Raises:
        ConvFusionError: the model is converted, the budget cannot be reached, or the moments are
            those of another model.
    """
    model = denoiser_of(pipe_or_model)
    limit = parse_budget(budget) if isinstance(budget, str) else budget
    if mixers_of(model):
        raise ConvFusionError("this model is converted already: revert it before choosing mixers")
    latents = _choose_latents(model, moments, size)
    if moments is None:
        return _choose_uniform(model, limit, latents, keep)
    return list_allocations(model, moments, latents, limit, keep, batch).within(limit)


def _choose_latents(model: Denoiser, moments: Moments | None, size: Grid | None) -> Grid:
    """Sides of the latents to plan for: those asked for, as many frames as the moments have.

    Without moments a video has its family's own frames.
    """
    frames = family_of(model).frames
    plain = (frames,) if frames else ()
    own = moments.latents if moments else (*plain, *native_latents(model))
    if size is None:
        return own
    return (*own[:-2], *size) if len(size) == 2 else size


@dataclass(frozen=True)
class Allocations:
    """The best choices for every budget at once.

    Attributes:
        places: of the sites.
        front: of the choices.
        whole: cost of all attentions, in the budget's unit.
        options: of each site, what the picks of the front name: (candidate, cost).
        latents: sides that it is planned for.
    """

    places: tuple[Place, ...]
    front: Front
    whole: float
    options: tuple[Sequence[tuple[Candidate, float]], ...]
    latents: Grid

    def within(self, budget: Budget) -> Allocation:
        """The best choice within a budget.

        Raises:
            ConvFusionError: there is none.
        """
        row = self.front.within(budget.limit(self.whole))
        if row is None:
            bound = budget.explain_bound(self.whole, float(self.front.costs[0]))
            raise ConvFusionError(
                f"a budget of {budget} cannot be reached here: {bound}{_explain(self.places)}"
            )
        timed = budget.unit == "s"
        sites = []
        for place, options, pick in zip(
            self.places, self.options, self.front.picks[row], strict=True
        ):
            candidate, cost = options[pick]
            sites.append(_choice(place, candidate, cost if timed else None))
        whole = self.whole if timed else None
        return Allocation(budget, self.latents, tuple(sites), BY_MOMENTS, whole)


def list_allocations(
    pipe_or_model: Any,
    moments: Moments,
    latents: Grid,
    budget: Budget,
    keep: int = 0,
    batch: int = 2,
) -> Allocations:
    """The best choices for every budget of the same unit; arguments as for `choose_mixers`."""
    model = denoiser_of(pipe_or_model)
    places = _find_places(model, _match_moments(model, moments), latents, keep)
    if budget.unit == "x":
        whole = float(sum(place.attention for place in places))
        options: list[Sequence[tuple[Candidate, float]]] = [place.options for place in places]
    else:
        seconds = time_candidates(model, _group(places), batch)
        whole = sum(seconds[place.shape][None] for place in places)
        options = []
        for place in places:
            timed = [c for c, _ in place.options if c.mixer in seconds[place.shape]]
            costs = [seconds[place.shape][each.mixer] for each in timed]
            options.append(keep_undominated(timed, costs))
    front = find_front(
        [
            [(cost, place.sensitivity * candidate.error) for candidate, cost in each]
            for place, each in zip(places, options, strict=True)
        ]
    )
    return Allocations(tuple(places), front, whole, tuple(options), latents)


def _find_places(
    model: Denoiser, measured: Mapping[str, SiteMoments], latents: Grid, keep: int
) -> list[Place]:
    kept = _find_dearest(list(measured.values()), keep)
    places = []
    for site, shape, attention in _list_shapes(model, latents):
        moments = measured[site.path]
        candidates = [Candidate(None, 0.0)]
        if site.path not in kept:
            candidates = list_candidates(moments, shape.grid)
        costs = [
            float(attention if each.mixer is None else count_operations(each.mixer, shape))
            for each in candidates
        ]
        options = keep_undominated(candidates, costs)
        places.append(Place(site, shape, attention, options, moments.sensitivity))
    return places


def _find_dearest(measured: Sequence[SiteMoments], keep: int) -> set[str]:
    """The paths of the sites whose replacement by a block of middle ranks costs most ε-error."""
    if not 0 <= keep < len(measured):
        raise ConvFusionError(
            f"{keep} attentions cannot be kept of {len(measured)}: at least one must be replaced"
        )

    if keep == 0:
        return set()

    def cost(site: SiteMoments) -> float:
        candidates = list_candidates(site, site.grid)
        halos = [c for c in candidates if c.mixer in DEAREST]
        least = min(c.error for c in candidates if c.mixer is not None)
        return site.sensitivity * (halos[0].error if halos else least)

    ranked = sorted(measured, key=cost, reverse=True)
    return {site.path for site in ranked[:keep]}


def _choose_uniform(model: Denoiser, budget: Budget, latents: Grid, keep: int) -> Allocation:
    if budget.unit == "s" or keep:
        what = "seconds" if budget.unit == "s" else "keeping the dearest attentions"
        raise ConvFusionError(f"{what} needs moments of this model: give them, or measure them")
    places = [Place(*each, (), 0.0) for each in _list_shapes(model, latents)]
    whole, rank = sum(place.attention for place in places), places[0].site.rank
    best: list[Candidate] | None = None
    least: float = math.inf
    for halos in zip(list_uniform(rank), list_shared(rank), strict=True):
        cost = sum(count_operations(halos[bool(p.site.joint)], p.shape) for p in places)
        least = min(least, cost)
        if cost <= budget.limit(whole):
            best = [Candidate(halo, math.nan) for halo in halos]
    if best is None:
        raise ConvFusionError(
            f"a budget of {budget} cannot be reached with halo blocks everywhere: "
            f"{budget.explain_bound(whole, least)}{_explain(places)}; with moments, cheaper blocks "
            "can be chosen too"
        )
    sites = tuple(_choice(place, best[bool(place.site.joint)], None) for place in places)
    return Allocation(budget, latents, sites, BY_OPERATIONS)


def _explain(places: Sequence[Place]) -> str:
    return OF_IMAGE if any(place.site.joint for place in places) else ""


def _choice(place: Place, candidate: Candidate, seconds: float | None) -> SiteChoice:
    mixer = candidate.mixer
    known = not math.isnan(candidate.error)
    return SiteChoice(
        site=place.site,
        grid=place.shape.grid,
        mixer=mixer,
        attention_operations=place.attention,
        operations=place.attention if mixer is None else count_operations(mixer, place.shape),
        imitation_error=candidate.error if known else None,
        epsilon_error=place.sensitivity * candidate.error if known else None,
        seconds=seconds,
    )


def _group(places: Sequence[Place]) -> dict[Shape, list[Place]]:
    groups: dict[Shape, list[Place]] = {}
    for place in places:
        groups.setdefault(place.shape, []).append(place)
    return groups


def _list_shapes(model: Denoiser, latents: Grid) -> Iterator[tuple[Site, Shape, int]]:
    """Every site, what the operations there depend on, and those of its attention.

    Sites of the same shape are counted once.
    """
    counter, known = JointCounter(model, latents), dict[Shape, int]()
    for site in list_sites(model):
        shape = Shape(site.channels, site.heads, grid_of(model, site, latents))
        if site.joint:
            parts = counter.count(site)
            yield site, replace(shape, kept=parts.kept), parts.whole
            continue
        if shape not in known:
            attention = model.get_submodule(site.path)
            known[shape] = attention_operations(attention, site.channels, shape.grid)
        yield site, shape, known[shape]


def _match_moments(model: Denoiser, moments: Moments) -> dict[str, SiteMoments]:
    """The moments by site of a model; a ConvFusionError if they are another one's."""
    own = {site.path: (site.channels, site.heads) for site in list_sites(model)}
    theirs = {site.path: (site.channels, site.heads) for site in moments.sites}
    if own != theirs:
        raise ConvFusionError("these moments are those of a model with other sites: measure this")
    if model.device.type != "meta" and fingerprint(model) != moments.teacher:
        raise ConvFusionError(
            "these moments were measured with other weights, or in another precision: measure "
            "this model"
        )
    return moments.by_path
