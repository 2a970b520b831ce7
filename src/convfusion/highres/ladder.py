"""Pictures larger than a model was trained for: drawn at its own size, then climbed up.

Each rung of the ladder enlarges the picture before it, adds noise for a late timestep, and lets the
pipeline denoise from there (SDEdit, arXiv 2108.01073). After each step the low frequencies, those
that the smaller picture had, are put back to its own with the noise of that step (as in ILVR, arXiv
2108.02938). So the layout is that of the size which the model knows, and the rungs add what a
larger picture shows. Enlarging is done on the pictures and not on the latents (docs/highres.md).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convfusion.analysis.capture import ask_timesteps
from convfusion.data.pictures import encode_pictures, upcast_vae
from convfusion.errors import ConvFusionError
from convfusion.families import (
    denoiser_of,
    family_of,
    latent_scale,
    native_size,
    pack_drawn,
    pixel_unit,
    unpack_drawn,
)
from convfusion.families.calls import check_call, cut_options
from convfusion.families.patches import kept_values, wrapped_method
from convfusion.generate import check_size, generate
from convfusion.highres.savings import (
    MemorySavings,
    choose_savings,
    chunk_feed_forward,
    run_one_at_a_time,
)
from convfusion.highres.vae_tiles import check_tileable, tile_vae
from convfusion.settings import check_fields
from convfusion.text import check_prompts

Size = tuple[int, int]  # (height, width) in pixels
OnStep = Callable[[int, int, int, int], None]  # rung of rungs, step of steps, each from 1

DIRECT = 1.5  # up to so many times its own side, a model is asked at once


@dataclass(frozen=True)
class Ladder:
    """How to climb.

    Attributes:
        factor: at most so many times larger, along a side, is a rung than the one before.
        strength: share of the denoising steps that a rung takes, from the last ones: little keeps
            the picture, much draws it anew and adds detail.
        keep: put the low frequencies of the picture below back after every step.
        guidance: classifier-free guidance scale of every rung but the first; 1 is none.
        memory: GiB that activations may take at once; 0 sets no bound.
        direct: draw at the size that is wanted at once.
    """

    factor: float = 2.0
    strength: float = 0.3
    keep: bool = True
    guidance: float = 1.0
    memory: float = 0.0
    direct: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 < self.factor <= 8:
            raise ConvFusionError(f"factor must lie between 1 and 8, not {self.factor}")
        if not 0 < self.strength <= 1:
            raise ConvFusionError(f"strength must lie between 0 and 1, not {self.strength}")
        if self.guidance < 1:
            raise ConvFusionError(f"a rung's guidance must be at least 1, not {self.guidance}")
        if self.memory < 0:
            raise ConvFusionError(f"memory must not be negative, not {self.memory}")


@dataclass(frozen=True)
class LadderPlan:
    """What a picture will take.

    Attributes:
        sizes: of the rungs, from the model's own to the one wanted.
        savings: what keeps it within memory.
    """

    sizes: tuple[Size, ...]
    savings: MemorySavings

    def __str__(self) -> str:
        path = " → ".join(f"{width}×{height}" for height, width in self.sizes)
        return f"{path}: {self.savings}"


def highres(
    pipe: Any,
    prompts: list[str],
    size: Size,
    *,
    seeds: list[int] | None = None,
    steps: int = 25,
    guidance: float = 5.0,
    ladder: Ladder = Ladder(),
    on_step: OnStep | None = None,
    **options: Any,
) -> list[Image.Image]:
    """One large picture per prompt, one after the other.

    With a single rung this is `generate`, bit for bit. The pipeline itself draws every rung; what
    is changed in it for that is put back, and what others have put there stays.

    Args:
        pipe: a pipeline that draws pictures of any size, converted or not.
        prompts: what to draw.
        size: (height, width) in pixels.
        seeds: one per prompt, by default 0, 1, 2, …
        steps: denoising steps of the first rung; the others take a share of them.
        guidance: classifier-free guidance scale of the first rung; 1 is none.
        ladder: how to climb.
        on_step: called after every step.
        options: further arguments of the pipeline's call.

    Raises:
        ConvFusionError: the size, the memory or another number will not do. Nothing is computed.
    """
    seeds = list(range(len(prompts))) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ConvFusionError(f"there are {len(prompts)} prompts and {len(seeds)} seeds")
    check_prompts(prompts)
    plan = plan_ladder(pipe, size, ladder, steps=steps, guidance=guidance)
    check_call(pipe, prompts, size, options)
    images = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        own = cut_options(pipe, options, i, i + 1, len(prompts))
        climb = _Climb(pipe, prompt, seed, steps, guidance, plan, on_step, own)
        image = climb.draw(0)
        for rung in range(1, len(plan.sizes)):
            image = climb.draw(rung, image, ladder)
        images.append(image)
    return images


def plan_ladder(
    pipe: Any, size: Size, ladder: Ladder = Ladder(), *, steps: int = 25, guidance: float = 5.0
) -> LadderPlan:
    """The rungs to a size, and the savings that keep them within memory.

    Raises:
        ConvFusionError: as for `highres`.
    """
    check_ladder(pipe)
    check_size(pipe, size)
    sizes: tuple[Size, ...] = (size,)
    if is_large(pipe, size) and not ladder.direct:
        sizes = list_rungs(native_size(pipe), size, ladder.factor, pixel_unit(pipe))
    if len(sizes) > 1 and round(steps * ladder.strength) < 1:
        raise ConvFusionError(
            f"a strength of {ladder.strength} leaves none of {steps} steps to a rung: "
            f"at least {math.ceil(0.5 / ladder.strength + 0.01)} steps are needed"
        )
    last = ladder.guidance if len(sizes) > 1 else guidance
    savings = choose_savings(pipe, size, ladder.memory, batch=2 if last > 1 else 1)
    if savings.tiles:
        check_tileable(pipe.vae)
    return LadderPlan(sizes, savings)


def check_ladder(pipe: Any) -> None:
    """Raise a ConvFusionError unless a pipeline draws at any size, from given latents."""
    denoiser = denoiser_of(pipe)
    if family_of(denoiser).fixed_size:
        raise ConvFusionError(
            f"a {type(denoiser).__name__} draws at its own size only: there is no ladder for it"
        )
    named = inspect.signature(type(pipe).__call__).parameters
    if "self" in named and not {"height", "latents"} <= named.keys():
        raise ConvFusionError(
            f"a {type(pipe).__name__} draws at the size of its pictures: there is no ladder for it"
        )


def is_large(pipe: Any, size: Size) -> bool:
    """Whether a size is so much above the denoiser's own that a ladder leads to it."""
    return math.prod(size) > DIRECT**2 * math.prod(native_size(pipe))


def list_rungs(native: Size, size: Size, factor: float, unit: int) -> tuple[Size, ...]:
    """Sizes from about as many pixels as the native size has, in the shape of the wanted one.

    Args:
        native: what the model was trained for.
        size: what is wanted, the last rung.
        factor: at most so much larger along a side is each than the one before, up to rounding.
        unit: what both sides are multiples of.
    """
    growth = math.sqrt(math.prod(size) / math.prod(native))
    climbs = math.ceil(math.log(growth, factor) - 0.01)
    shrinks = [growth ** (-climb / climbs) for climb in range(climbs, 0, -1)]
    below = [
        tuple(max(unit, round(side * shrink / unit) * unit) for side in size) for shrink in shrinks
    ]
    return (*((height, width) for height, width in below), size)


@dataclass(frozen=True)
class _Climb:
    """One picture on its way up."""

    pipe: Any
    prompt: str
    seed: int
    steps: int
    guidance: float
    plan: LadderPlan
    on_step: OnStep | None
    options: dict[str, Any]

    def draw(
        self, rung: int, image: Image.Image | None = None, ladder: Ladder = Ladder()
    ) -> Image.Image:
        """The picture of a rung: from noise, or from the picture below it."""
        pipe, savings, size = self.pipe, self.plan.savings, self.plan.sizes[rung]
        model, scale = denoiser_of(pipe), latent_scale(pipe)
        seed = self.seed if image is None else mix_seed(self.seed, rung)
        options, kept, guidance = dict(self.options), self.steps, self.guidance
        with ExitStack() as stack:
            if len(self.plan.sizes) > 1 or savings.tiles:
                stack.enter_context(upcast_vae(pipe.vae))
                stack.enter_context(tile_vae(pipe.vae, savings.tiles))
            if savings.chunks:
                stack.enter_context(chunk_feed_forward(model, (size[0] // scale, size[1] // scale)))
            if savings.one_at_a_time:
                stack.enter_context(run_one_at_a_time(model))
            start = None
            if image is not None:
                kept, guidance = round(self.steps * ladder.strength), ladder.guidance
                start = Start.from_picture(pipe, image, size, seed)

            def draw() -> Image.Image:
                return generate(
                    pipe,
                    [self.prompt],
                    seeds=[seed],
                    steps=self.steps,
                    guidance=guidance,
                    size=size,
                    progress=False,
                    **options,
                )[0]

            climbing = keep_last_steps(
                pipe,
                self.steps,
                kept,
                self._report_steps(rung),
                start if ladder.keep else None,
                draw if is_flow(pipe.scheduler) else None,
            )
            scheduler = stack.enter_context(climbing)
            if start is not None:
                noisy = start.add_noise(scheduler, scheduler.timesteps[0])
                scale_of_noise = getattr(scheduler, "init_noise_sigma", 1.0)
                options["latents"] = pack_drawn(pipe, noisy) / scale_of_noise
            return draw()

    def _report_steps(self, rung: int) -> Callable[[int, int], None]:
        def after(step: int, steps: int) -> None:
            if self.on_step:
                self.on_step(rung + 1, len(self.plan.sizes), step, steps)

        return after


@dataclass(frozen=True)
class Start:
    """What a rung starts from.

    Attributes:
        clean: latents of the enlarged picture, [B, C, h, w].
        noise: as they are.
        below: (height, width) of the latents of the picture below.
    """

    clean: Tensor
    noise: Tensor
    below: Size

    @classmethod
    def from_picture(cls, pipe: Any, image: Image.Image, size: Size, seed: int) -> Start:
        """From the picture below, for a size in pixels."""
        scale, dtype = latent_scale(pipe), denoiser_of(pipe).dtype
        device = pipe._execution_device  # which an offloaded model is on only while it computes
        large = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.LANCZOS)
        clean = encode_pictures(pipe.vae, np.array(large)[None])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        below = (image.height // scale, image.width // scale)
        return cls(clean.to(device, dtype), noise.to(device, dtype), below)

    def add_noise(self, scheduler: Any, timestep: Tensor | None) -> Tensor:
        """With the noise of a timestep; None is the end, where there is none."""
        if timestep is None:
            return self.clean
        if is_flow(scheduler):
            share = (timestep / scheduler.config.num_train_timesteps).to(self.clean)
            return (1 - share) * self.clean + share * self.noise
        return scheduler.add_noise(self.clean, self.noise, timestep[None])

    def keep_layout_of(self, pipe: Any, packed: Tensor, noisy: Tensor) -> Tensor:
        """The same of latents as a pipeline has them while it draws."""
        height, width = (side * latent_scale(pipe) for side in self.clean.shape[-2:])
        latents = unpack_drawn(pipe, packed, (height, width))
        return pack_drawn(pipe, self.keep_layout(latents, noisy))

    def keep_layout(self, latents: Tensor, noisy: Tensor) -> Tensor:
        """Latents with the low frequencies of others, those that the picture below had."""
        low = F.interpolate(noisy - latents, size=self.below, mode="area")
        return latents + F.interpolate(low, size=latents.shape[-2:], mode="bicubic")


def mix_seed(seed: int, rung: int) -> int:
    """A seed of its own for each rung: PyTorch's CPU generator looks at the low 32 bits only."""
    return (seed * 1_000_003 + rung) % 2**32


@contextmanager
def keep_last_steps(
    pipe: Any,
    steps: int,
    kept: int,
    after_step: Callable[[int, int], None] = lambda step, steps: None,
    start: Start | None = None,
    draw: Callable[[], Any] | None = None,
) -> Iterator[Any]:
    """Let a pipeline take only the last steps of a schedule, for a while.

    Args:
        pipe: the `set_timesteps` of its scheduler leaves the first ones out meanwhile.
        steps: of the whole schedule.
        kept: how many of them are taken.
        after_step: called after each call of the scheduler's `step` with its number, from 1, and
            the number of them all.
        start: whose low frequencies are put back after each step.
        draw: lets the pipeline draw, which is stopped at the first call of its denoiser: it sets
            the timesteps, where a pipeline does that by itself.

    Yields:
        The scheduler, with its timesteps set. Afterwards it holds what it held before.
    """
    scheduler = pipe.scheduler
    first, taken, whole = (steps - kept) * scheduler.order, 0, torch.empty(0)

    def set_last_timesteps(set_timesteps: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal whole
        set_timesteps(*args, **kwargs)
        whole = scheduler.timesteps
        if first:
            scheduler.timesteps = whole[first:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)

    def counted_step(take_step: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        scheduler.timesteps = whole  # the pipeline has the last ones by now; indices count from 0
        if first and not taken and getattr(scheduler, "step_index", 0) is None:
            scheduler.set_begin_index(first)  # some pipelines have set 0 since
        result = take_step(*args, **kwargs)
        taken += 1
        after_step(taken, len(whole) - first)
        if start is None:
            return result
        timestep = whole[first + taken] if first + taken < len(whole) else None
        noisy = start.add_noise(scheduler, timestep)
        return (start.keep_layout_of(pipe, result[0], noisy), *result[1:])

    with (
        kept_values(scheduler),
        wrapped_method(scheduler, "set_timesteps", set_last_timesteps),
        wrapped_method(scheduler, "step", counted_step),
    ):
        if draw is None:
            scheduler.set_timesteps(steps)
        else:
            ask_timesteps(pipe, draw)
        yield scheduler


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of diffusers' for flows: latents hold t/T of noise there."""
    return not hasattr(scheduler, "add_noise")
