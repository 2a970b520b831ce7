"""Will it be faster here? What a conversion would bring, before anything is converted.

At each kind of site the attention and its block are timed at two sizes, which gives the laws

    attention: a·N + b·N²        block: c·N

of the time over the N tokens (projections and scores; everything in a block is linear). The rest
of the denoiser is timed with nothing at the sites, and is linear in N too. So one fit tells the
time at any size, the size from which on the block is the faster one, and the bound: what is left
when the sites cost nothing.

Where text and image share an attention, a block replaces what goes from image to image. What stays
of it is timed by itself and taken off both, since it is part of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from convfusion.bench.latency import (
    Measured,
    SiteKind,
    Variant,
    denoiser_call,
    site_kinds,
    time_site,
)
from convfusion.bench.timing import Timing, time_interleaved
from convfusion.errors import ConvFusionError
from convfusion.families import (
    count_sequences,
    denoiser_of,
    example_inputs,
    family_of,
    list_sites,
    site_grid,
)
from convfusion.mixers import Removed
from convfusion.mixers.tokens import Grid
from convfusion.surgery import attention_teacher, mixers_of
from convfusion.surgery.config import ConvertConfig, uniform
from convfusion.surgery.mixed import replaced_layers

LARGEST = 64 * 64  # tokens that are timed; beyond, the fitted laws speak
ROUNDS = 3
WORK = 500_000_000_000  # multiply-adds of weights with tokens, in a forward pass that is timed
LEAST = 0.01  # of a time, below which what is left of it is noise
FEWEST = 256  # tokens, below which weights take longer to read than to work with


@dataclass(frozen=True)
class Law:
    """Seconds at N tokens: linear·N + square·N²."""

    linear: float
    square: float = 0.0

    def __call__(self, tokens: float) -> float:
        return self.linear * tokens + self.square * tokens**2


def fit_law(times: dict[int, float]) -> Law:
    """The law through the measured times, by N, of one or two sizes; no part of it is negative.

    Where both cannot hold, the line or parabola through the larger size alone is taken.
    """
    (small, fast), (large, slow) = min(times.items()), max(times.items())
    if small == large:
        return Law(slow / large)
    square = max(0.0, (slow / large - fast / small) / (large - small))
    if slow / large <= square * large:
        return Law(0.0, slow / large**2)
    return Law(slow / large - square * large, square)


def fit_line(times: dict[int, float]) -> Law:
    """The line through the origin and the time at the largest N."""
    tokens, seconds = max(times.items())
    return Law(seconds / tokens)


def shrink_grid(grid: Grid, tokens: int) -> Grid:
    """A grid of the same shape, nearly, that has no more than so many tokens, and at least one."""
    share = min(1.0, (tokens / math.prod(grid)) ** (1 / len(grid)))
    return tuple(max(1, int(side * share)) for side in grid)


@dataclass(frozen=True)
class SitePlan:
    """What one kind of sites costs at the planned size.

    Attributes:
        paths: of the sites.
        channels, kernel_size: of them.
        tokens: N at the planned size.
        attention, block: laws of the seconds of one site; where a text shares it, without what
            stays of it, which is part of the rest.
        measured: N was timed itself; otherwise the laws speak.
        attention_weights, block_weights: bytes of the parameters of one site.
        joint: whether text and image share it.
    """

    paths: tuple[str, ...]
    channels: int
    kernel_size: int | None
    tokens: int
    attention: Law
    block: Law
    measured: bool
    attention_weights: int
    block_weights: int
    joint: bool = False

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the attentions and of the blocks of all these sites."""
        return (
            len(self.paths) * self.attention(self.tokens),
            len(self.paths) * self.block(self.tokens),
        )

    @property
    def keeps_attention(self) -> bool:
        """Whether the attention is the cheaper one here."""
        attention, block = self.seconds
        return attention < block


@dataclass(frozen=True)
class SpeedPlan:
    """What a conversion brings for latents of one size on one device.

    Attributes:
        size: (height, width) of the latents, of a video with its frames before them.
        batch: samples of a forward pass.
        sites: by kind.
        rest: seconds of the denoiser without its self-attention.
    """

    size: Grid
    batch: int
    sites: tuple[SitePlan, ...]
    rest: float

    @property
    def attention(self) -> float:
        """Seconds of a forward pass with the attention everywhere."""
        return self.rest + sum(site.seconds[0] for site in self.sites)

    @property
    def converted(self) -> float:
        """Seconds with a block at every site."""
        return self.rest + sum(site.seconds[1] for site in self.sites)

    @property
    def hybrid(self) -> float:
        """Seconds with the cheaper of the two at each site."""
        return self.rest + sum(min(site.seconds) for site in self.sites)

    @property
    def bound(self) -> float:
        """The speed-up if the sites cost nothing at all."""
        return self.attention / self.rest

    @property
    def kept(self) -> tuple[str, ...]:
        """Paths of the sites at which the attention is the cheaper one."""
        return tuple(path for site in self.sites if site.keeps_attention for path in site.paths)

    @property
    def faster_from(self) -> tuple[int, int] | None:
        """(height, width) of latents of this shape from which on the converted model is faster.

        Those of a video have as many frames as here. (0, 0) if it is at every size; None if it is
        at none, since the attention grows no faster.
        """
        own = [(len(s.paths), s.tokens, s.attention, s.block) for s in self.sites]
        ahead = sum(k * n * (block.linear - attention.linear) for k, n, attention, block in own)
        square = sum(k * n * n * attention.square for k, n, attention, _ in own)
        if ahead <= 0:
            return 0, 0
        if square == 0:
            return None
        side = math.sqrt(ahead / square)  # the square root of how often the planned tokens
        return round(self.size[-2] * side), round(self.size[-1] * side)

    @property
    def weights(self) -> tuple[int, int]:
        """Bytes of the parameters of all attentions that could be dropped, and of all blocks."""
        return (
            sum(len(s.paths) * s.attention_weights for s in self.sites),
            sum(len(s.paths) * s.block_weights for s in self.sites),
        )


def plan_speed(
    pipe_or_model: Any,
    config: ConvertConfig,
    size: Grid,
    *,
    batch: int = 2,
    on_case: Callable[[str], None] | None = None,
) -> SpeedPlan:
    """Measure what a conversion would bring for latents of a size, without converting.

    Args:
        pipe_or_model: unconverted, on the device and in the dtype to plan for.
        config: of the conversion.
        size: (height, width) of the latents, or (frames, height, width) of a video's, which
            without a number of frames has the family's own.
        batch: samples of a forward pass; two are one picture under classifier-free guidance.
        on_case: told what is measured next.

    Raises:
        ConvFusionError: it is converted.
    """
    model = denoiser_of(pipe_or_model)
    if mixers_of(model):
        raise ConvFusionError("this model is converted already: revert it before planning")
    say = on_case or (lambda text: None)
    plans = []
    for kind in site_kinds(model, config):
        say(f"{kind.site.channels} channels, {len(kind.paths)} sites")
        plans.append(_plan_site(model, kind, config, size, batch))
    say("the rest of the denoiser")
    whole = _with_frames(model, size)
    return SpeedPlan(whole, batch, tuple(plans), _rest(model, whole, batch))


def find_cheaper_attention(
    pipe_or_model: Any, size: tuple[int, int], *, batch: int = 2
) -> tuple[str, ...]:
    """Converted sites at which the attention is the cheaper one for latents of a size, measured.

    `convfusion.surgery.attention_back` lets the attention stand in there.

    Args:
        pipe_or_model: converted, with its attention kept.
        size: (height, width) of the latents.
        batch: samples of a forward pass.

    Raises:
        ConvFusionError: nothing is converted, or the attention was dropped.
    """
    student = denoiser_of(pipe_or_model)
    mixers = mixers_of(student)
    stock = attention_teacher(student)
    config = ConvertConfig({path: mixer.config for path, mixer in mixers.items()})
    kinds = [kind for kind in site_kinds(stock, config) if kind.paths[0] in mixers]
    plans = [_plan_site(stock, kind, config, size, batch) for kind in kinds]
    return tuple(path for plan in plans if plan.keeps_attention for path in plan.paths)


def _plan_site(
    model: Any, kind: SiteKind, config: ConvertConfig, latents: Grid, batch: int
) -> SitePlan:
    weight = next(model.parameters())
    grid = site_grid(model, kind.site, latents)
    tokens = math.prod(grid)
    variants = {"attention": Variant(), "block": Variant(config)}
    stays = {"what stays of it": Variant(uniform(Removed()))} if kind.site.joint else {}
    times: dict[str, dict[int, float]] = {name: {} for name in variants}
    large = shrink_grid(grid, LARGEST)
    batch *= count_sequences(model, kind.site, latents)
    for timed in (shrink_grid(large, math.prod(large) // 4), large):
        by_name = time_site(
            model, kind.site, variants | stays, timed, batch=batch, dtype=weight.dtype,
            device=weight.device, rounds=ROUNDS,
        )  # fmt: skip
        found = {name: _median(name, kind, each) for name, each in by_name.items()}
        for name in variants:
            above = found[name] - sum(found[each] for each in stays)
            times[name][math.prod(timed)] = max(above, LEAST * found[name])
    own, mixer = _weights(model, kind, config)
    return SitePlan(
        paths=kind.paths,
        channels=kind.site.channels,
        kernel_size=kind.kernel_size,
        tokens=tokens,
        attention=fit_law(times["attention"]),
        block=fit_line(times["block"]),
        measured=large == grid,
        attention_weights=own,
        block_weights=mixer,
        joint=kind.site.joint is not None,
    )


def _median(name: str, kind: SiteKind, measured: Measured) -> float:
    if measured.timing is None:
        raise ConvFusionError(f"{name} at {kind.site.path}: {measured.note}")
    return measured.timing.median


def _weights(model: Any, kind: SiteKind, config: ConvertConfig) -> tuple[int, int]:
    """Bytes of the parameters of an attention of this kind, and of what the config puts there."""
    attention = model.get_submodule(kind.site.path)
    each = next(attention.parameters()).element_size()
    settings = config.mixer_for(kind.site.path)
    layers = [] if kind.site.joint else replaced_layers(attention).values()
    own = sum(p.numel() for layer in layers for p in layer.parameters())
    if settings is None:
        return each * own, each * own
    with torch.device("meta"):
        mixer = kind.site.build(settings)
    return each * own, each * sum(p.numel() for p in mixer.parameters())


def _rest(model: Any, latents: Grid, batch: int) -> float:
    """Seconds of a forward pass with nothing at the sites.

    Of a large one the line through two smaller ones tells: what is worked out of the text is the
    same at every size, and all else is linear in the latents, frames among them.
    """
    large = _fitting(model, latents, batch, 1.0)
    sizes = [large] if large == latents else [_fitting(model, latents, batch, 0.25), large]
    device = next(model.parameters()).device
    times: dict[int, float] = {}
    for size in sizes:
        inputs = example_inputs(model, size, batch=batch)
        call = denoiser_call(model, Variant(uniform(Removed())), inputs)
        timing: Timing = time_interleaved({"rest": call}, device, ROUNDS)["rest"]
        times[math.prod(size)] = timing.median
    (first, fast), (last, slow) = min(times.items()), max(times.items())
    slope = max(0.0, (slow - fast) / (last - first)) if last > first else slow / last
    return slow + slope * (math.prod(latents) - last)


def _with_frames(model: Any, latents: Grid) -> Grid:
    frames = family_of(model).frames
    return (frames, *latents) if frames and len(latents) == 2 else latents


def _fitting(model: Any, latents: Grid, batch: int, share: float) -> Grid:
    """Sides of latents of the same shape that a forward pass can be timed with.

    They make at most `LARGEST` in all, fewer of a transformer with many weights, all of which work
    on each of its tokens. Frames that are mixed each by itself stay as many as they are.
    """
    unit = family_of(model).latent_unit(model)
    most = LARGEST // unit**2
    if unit == family_of(model).patch_size(model):
        weights = sum(parameter.numel() for parameter in model.parameters())
        most = min(most, max(FEWEST, WORK // (batch * weights)))
    kept = len(latents) - list_sites(model)[0].rank
    frames, shrunk = latents[:kept], latents[kept:]
    units = (*shrunk[:-2], *(side // unit for side in shrunk[-2:]))
    *others, height, width = shrink_grid(units, int(share * most) // math.prod(frames))
    return (*frames, *others, height * unit, width * unit)


def describe_plan(plan: SpeedPlan, scale: int, unit: int) -> list[str]:
    """What a plan means, a sentence a line; sides of pictures are multiples of `unit`."""
    speedup = plan.attention / plan.converted
    share = 1 - 1 / plan.bound
    lines = [
        f"Converted, it would be {speedup:.2f}× as fast here. More than {plan.bound:.2f}× is not "
        f"possible, since self-attention takes {share:.0%} of the time."
    ]
    start = plan.faster_from
    if start is None:
        lines.append("It is faster at no size: the time of attention does not grow faster here.")
    elif start == (0, 0):
        lines.append("By extrapolation it is faster at every size.")
    else:
        height, width = (-(-side * scale // unit) * unit for side in start)  # that can be drawn
        lines.append(f"By extrapolation it is faster from {width}×{height} pixels on.")
    if plan.kept and len(plan.kept) < sum(len(site.paths) for site in plan.sites):
        lines.append(
            f"Attention is faster at {len(plan.kept)} site{'s' if len(plan.kept) > 1 else ''}. "
            f"Keeping it there (generate --hybrid) gives {plan.attention / plan.hybrid:.2f}×."
        )
    dropped, added = (count / 2**20 for count in plan.weights)
    freed = f"Dropping the attention frees {dropped:,.1f} MiB of weights"
    if any(site.joint for site in plan.sites):
        lines.append(
            "Where text and image share an attention, only what goes from image to image can be "
            "replaced: its projections and what involves the text count with the rest."
        )
        freed = freed if dropped else "There are no weights to drop"
    lines.append(f"{freed}; the blocks take {added:,.1f}{'' if dropped else ' MiB'}.")
    return lines
