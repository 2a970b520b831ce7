"""How long what may stand at a site takes on this device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from convfusion.bench.latency import Variant, time_site
from convfusion.budget.candidates import Candidate, Shape, keep_undominated
from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser
from convfusion.mixers import Mixer
from convfusion.surgery import uniform

if TYPE_CHECKING:
    from convfusion.budget.choose import Place

TIMED = 10  # candidates for the sites of one shape, beside the attention
ROUNDS = 3


def time_candidates(
    model: Denoiser, groups: Mapping[Shape, Sequence[Place]], batch: int
) -> dict[Shape, dict[Mixer | None, float]]:
    """Seconds of the best candidates for each shape of sites, in turn, with random weights.

    Args:
        model: on the device and in the dtype to plan for.
        groups: the places by the shape of their sites.
        batch: samples.

    Returns:
        By shape and mixer, None being the attention, the median of three calls of one site.

    Raises:
        ConvFusionError: the model is on the meta device, or a mixer cannot be timed.
    """
    if model.device.type == "meta":
        raise ConvFusionError("seconds cannot be measured without a device: give operations, as 4x")
    times: dict[Shape, dict[Mixer | None, float]] = {}
    for shape, places in groups.items():
        mixers = [None, *choose_timed(places)]
        variants = {
            str(number): Variant(None if mixer is None else uniform(mixer))
            for number, mixer in enumerate(mixers)
        }
        measured = time_site(
            model,
            places[0].site,
            variants,
            shape.grid,
            batch=batch,
            dtype=model.dtype,
            device=model.device,
            rounds=ROUNDS,
        )
        own: dict[Mixer | None, float] = {}
        for mixer, each in zip(mixers, measured.values(), strict=True):
            if each.timing is None:
                raise ConvFusionError(f"{mixer} at {places[0].site.path}: {each.note}")
            own[mixer] = each.timing.median
        times[shape] = own
    return times


def choose_timed(places: Sequence[Place], most: int = TIMED) -> list[Mixer]:
    """Mixers to time for sites of one shape: of the best by operations and mean error, a spread."""
    costs: dict[Mixer, float] = {}
    errors: dict[Mixer, list[float]] = {}
    for place in places:
        for candidate, cost in place.options:
            if candidate.mixer is not None:
                costs[candidate.mixer] = cost
                errors.setdefault(candidate.mixer, []).append(candidate.error)
    means = [Candidate(mixer, sum(own) / len(own)) for mixer, own in errors.items()]
    best = [each.mixer for each, _ in keep_undominated(means, list(costs.values()))]
    steps = max(1, min(most, len(best)) - 1)
    chosen = {round(i * (len(best) - 1) / steps) for i in range(steps + 1)} if best else set()
    return [mixer for place, mixer in enumerate(best) if place in chosen and mixer is not None]
