"""Whole benchmarks: a model at several sizes, each case as the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from convfusion.bench.latency import (
    Measured,
    SiteKind,
    Variant,
    site_kinds,
    time_denoiser,
    time_site,
)
from convfusion.bench.models import BenchModel
from convfusion.bench.rows import Row, make_rows
from convfusion.bench.timing import describe_machine
from convfusion.families import Denoiser, count_sequences, list_sites, site_grid
from convfusion.surgery.presets import choose_preset, get_preset

Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Conditions:
    """Under which all cases of a benchmark are measured.

    Attributes:
        device: that everything runs on.
        dtype: of weights and tokens.
        batch: samples; two are one picture under classifier-free guidance.
        backward: gradients are worked out too.
        rounds: counted ones of each variant.
        warm_up: call each variant once before, uncounted; sites always do.
        recorded: replays of CUDA graphs are timed, which the rows say beside the device.
        limit: seconds; a variant is left out where one call would probably take longer.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int = 2
    backward: bool = False
    rounds: int = 5
    warm_up: bool = True
    recorded: bool = False
    limit: float = 60.0

    def describe(self) -> dict[str, Any]:
        """What a row says of where it was measured."""
        where = describe_machine(self.device)
        return where | {"device": f"{where['device']} (CUDA graphs)"} if self.recorded else where


def site_rows(
    model: BenchModel,
    variants: Mapping[str, Variant],
    sizes: Sizes,
    under: Conditions,
    on_case: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Row]]:
    """Time each kind of site of a model at each size; the rows of a case as it is done.

    Args:
        model: on the meta device.
        variants: by name.
        sizes: (height, width) in pixels, from the smallest to the largest.
        under: the conditions.
        on_case: told what is measured next.
    """
    config = get_preset(choose_preset(model.denoiser))
    for kind in site_kinds(model.denoiser, config):
        limits = Limits(under.limit)
        batch = under.batch * count_sequences(model.denoiser, kind.site)
        for size in sizes:
            grid = site_grid(model.denoiser, kind.site, model.latents(size))
            tokens = math.prod(grid)
            on_case(f"{model.name} {kind.site.path} {'×'.join(map(str, reversed(grid)))} tokens")
            kept, left_out = limits.split(variants, tokens)
            timed = time_site(
                model.denoiser, kind.site, kept, grid, batch=batch, dtype=under.dtype,
                device=under.device, backward=under.backward, rounds=under.rounds,
            )  # fmt: skip
            limits.learn(timed, tokens)
            case = _case(model, kind, tokens, size, under)
            yield make_rows(timed | left_out, case, under.describe())


def denoiser_rows(
    model: BenchModel,
    variants: Mapping[str, Variant],
    sizes: Sizes,
    under: Conditions,
    on_case: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Row]]:
    """Time whole forward passes of a model with random weights at each size.

    The arguments are those of `site_rows`; `limit` does not apply.
    """
    denoiser = with_random_weights(model.denoiser, under.device, under.dtype)
    sites = list_sites(denoiser)
    first = SiteKind(sites[0], None, tuple(site.path for site in sites))
    for size in sizes:
        latents = model.latents(size)

        def say(name: str, size: tuple[int, int] = size) -> None:
            on_case(f"{model.name} {size[1]}×{size[0]} pixels, {name}")

        measured = time_denoiser(
            denoiser, variants, latents, batch=under.batch, backward=under.backward,
            recorded=under.recorded,
            rounds=under.rounds, warm_up=under.warm_up, on_call=say,
        )  # fmt: skip
        tokens = math.prod(site_grid(denoiser, sites[0], latents))
        case = _case(model, first, tokens, size, under) | {"site": "", "channels": None}
        yield make_rows(measured, case, under.describe())


def _case(
    model: BenchModel, kind: SiteKind, tokens: int, size: tuple[int, int], under: Conditions
) -> dict[str, Any]:
    return {
        "model": model.name,
        "site": kind.site.path,
        "count": len(kind.paths),
        "channels": kind.site.channels,
        "kernel_size": kind.kernel_size,
        "width": size[1],
        "height": size[0],
        "tokens": tokens,
        "batch": under.batch,
        "dtype": str(under.dtype).removeprefix("torch."),
        "backward": under.backward,
    }


class Limits:
    """Foretells from the sizes before how long a variant would take, so as to leave it out.

    Of one size the time is taken to grow with the square of the tokens, of several by the
    exponent between the last two.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.seen: dict[str, list[tuple[int, float]]] = {}

    def split(
        self, variants: Mapping[str, Variant], tokens: int
    ) -> tuple[dict[str, Variant], dict[str, Measured]]:
        """The variants to time at N tokens, and a note for each of the others."""
        times = {name: self.expected(name, tokens) for name in variants}
        kept = {name: v for name, v in variants.items() if times[name] <= self.seconds}
        notes = {
            name: Measured(None, None, f"left out: about {times[name]:.0f} s a call")
            for name in variants
            if name not in kept
        }
        return kept, notes

    def expected(self, name: str, tokens: int) -> float:
        """Seconds of a call at N tokens; 0 where nothing is known."""
        seen = self.seen.get(name, [])
        if not seen:
            return 0.0
        (last, seconds), exponent = seen[-1], 2.0
        if len(seen) > 1 and seen[-2][0] < last:
            before, less = seen[-2]
            exponent = max(1.0, math.log(seconds / less) / math.log(last / before))
        return seconds * (tokens / last) ** exponent

    def learn(self, measured: Mapping[str, Measured], tokens: int) -> None:
        for name, each in measured.items():
            if each.timing is not None:
                self.seen.setdefault(name, []).append((tokens, each.timing.median))


def with_random_weights(denoiser: Denoiser, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """A denoiser of the same configuration with the weights that diffusers starts it from."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(0)
        made = type(denoiser).from_config(denoiser.config)
    return made.to(dtype).eval().requires_grad_(False)


def with_compiled(variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """The variants, and after each ΔConvBlock and halo block the same one compiled."""
    both = {}
    for name, variant in variants.items():
        both[name] = variant
        if name.startswith(("delta_conv", "halo")):
            both[f"{name} compiled"] = replace(variant, compiled=True)
    return both
