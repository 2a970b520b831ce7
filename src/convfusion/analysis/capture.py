"""Watch the self-attention of a pipeline while it draws, without touching what it draws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.analysis.streaming import AttentionSums, Measure, measure_attention
from convfusion.analysis.text_share import TextSums, measure_text_share
from convfusion.errors import ConvFusionError
from convfusion.families import (
    Denoiser,
    Site,
    denoiser_of,
    family_of,
    native_frames,
    stack_samples,
)
from convfusion.families.carrier import argument_position
from convfusion.families.watch import watch_attention
from convfusion.mixers.base import project_heads, score_scale
from convfusion.mixers.tokens import Grid, JointTokens, TokenSample
from convfusion.surgery import mixers_of


@dataclass
class Captured:
    """What was seen of one site.

    Attributes:
        grid: (H, W) of its tokens.
        by_timestep: sums over pictures at each timestep: of the heads and, last, their mean.
        mean_map: [Q, N] float32 on the model's device, the mean over heads of the chosen queries
            summed over pictures and timesteps; `maps` says how many went in.
        text: what of it went to a text, at each timestep; empty where there is none.
    """

    grid: Grid
    by_timestep: dict[float, AttentionSums]
    mean_map: Tensor
    maps: int = 0
    text: dict[float, TextSums] = field(default_factory=dict)

    @classmethod
    def blank(cls, grid: Grid, settings: Measure, tokens: Tensor) -> Captured:
        """Nothing seen yet, for tokens [B, N, C] on a grid."""
        queries = len(settings.chosen_queries(grid))
        return cls(grid, {}, torch.zeros(queries, tokens.shape[1], device=tokens.device))

    @torch.no_grad()
    def add(
        self,
        attention: Any,
        given: TokenSample,
        timestep: float,
        settings: Measure,
        padding: Tensor | None = None,
    ) -> None:
        """Measure the attention of a batch of tokens, of the image's among each other.

        Args:
            attention: a diffusers attention.
            given: what it is called with.
            timestep: of the call.
            settings: what to measure.
            padding: [B, T], true where a token of the text is padding, if that is known.

        Raises:
            ConvFusionError: the grid is another than before, or a map is not finite.
        """
        if given.grid != self.grid:
            raise ConvFusionError("analyse pictures of one size at a time")
        queries, keys, _ = project_heads(attention, given)
        scale = score_scale(attention)
        for query, key in zip(queries, keys, strict=True):
            sums = measure_attention(query, key, scale, given.grid, settings, self.mean_map)
            before = self.by_timestep.get(timestep)
            self.by_timestep[timestep] = sums if before is None else before + sums
            self.maps += 1
        if given.joint is not None:
            self.add_text(given.joint, timestep, settings, padding)

    def add_text(
        self, joint: JointTokens, timestep: float, settings: Measure, padding: Tensor | None
    ) -> None:
        """Measure what goes to the text; where each row's padding is known, to padding too."""
        words, queries = joint.text.key.shape[2], settings.chosen_queries(self.grid)
        if not words:
            return
        if padding is not None and padding.shape != (len(joint.image.query), words):
            padding = None  # of a text that is put together in another way
        chunk = settings.chunk(joint.image.query.shape[1], joint.image.query.shape[2] + words)
        sums = measure_text_share(joint, queries, chunk, padding)
        before = self.text.get(timestep)
        self.text[timestep] = sums if before is None else before + sums


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser during sampling: what went in, by position and name, and came out."""

    timestep: float
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor


def sampling_timesteps(pipe: Any, steps: int) -> list[float]:
    """The timesteps at which a pipeline calls its denoiser in so many steps, repeated ones too.

    Raises:
        ConvFusionError: the scheduler cannot take that many steps.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, ZeroDivisionError) as error:
        raise ConvFusionError(f"{steps} sampling steps cannot be taken: {error}") from None
    return [as_timestep(t) for t in scheduler.timesteps]


def as_timestep(value: Any) -> float:
    """A timestep as a plain number to four decimals; whole ones as integers."""
    number = round(float(value), 4)
    return int(number) if number.is_integer() else number


def count_steps(pipe: Any, steps: int) -> int:
    """How many steps a pipeline really takes where it is asked for so many."""
    if pipe.scheduler.config.get("use_dynamic_shifting"):
        return steps  # timesteps go by the size of what is drawn, but there is one for each step
    return len(sampling_timesteps(pipe, steps))


class _FirstCall(Exception):
    """A pipeline has come to the first call of its denoiser."""


def ask_timesteps(pipe: Any, draw: Callable[[], Any]) -> list[float]:
    """The timesteps of what a pipeline draws, as it sets them itself: some go by the size.

    Args:
        pipe: the pipeline.
        draw: lets it draw; this is stopped at the first call of its denoiser.
    """

    def stop(*_: Any) -> None:
        raise _FirstCall

    handle = denoiser_of(pipe).register_forward_pre_hook(stop, prepend=True)
    try:
        draw()
    except _FirstCall:
        pass
    finally:
        handle.remove()
    return [as_timestep(t) for t in pipe.scheduler.timesteps]


def visited_timesteps(pipe: Any, steps: int, draw: Callable[[], Any]) -> list[float]:
    """The timesteps at which a pipeline calls its denoiser while it draws.

    They are those of its scheduler, which is asked alone where they do not go by the size of what
    is drawn.

    Args:
        pipe: the pipeline.
        steps: that it draws with.
        draw: lets it draw.

    Raises:
        ConvFusionError: the scheduler cannot take that many steps.
    """
    if native_frames(pipe) or pipe.scheduler.config.get("use_dynamic_shifting"):
        return ask_timesteps(pipe, draw)
    return sampling_timesteps(pipe, steps)


def choose_timesteps(
    steps: int,
    wanted: tuple[float, ...] | None,
    visited: Sequence[float],
) -> list[float]:
    """The wanted timesteps in sampling order; by default five, spread over the schedule.

    Args:
        steps: sampling steps.
        wanted: timesteps to look at.
        visited: those of its sampling.

    Raises:
        ConvFusionError: the scheduler does not visit a wanted one.
    """
    visited = list(dict.fromkeys(visited))
    if wanted is None:
        count = min(5, len(visited))
        return [visited[(2 * i + 1) * len(visited) // (2 * count)] for i in range(count)]
    wanted = tuple(as_timestep(t) for t in wanted)
    unknown = [t for t in wanted if t not in visited]
    if unknown or not wanted:
        raise ConvFusionError(
            f"{', '.join(map(str, unknown)) or 'no timestep'} is not among the timesteps of "
            f"{steps} sampling steps: {', '.join(map(str, visited))}"
        )
    return [t for t in visited if t in wanted]


def check_prompts(prompts: list[str]) -> None:
    """Raise a ConvFusionError unless there is a list with at least one prompt."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConvFusionError(f"prompts must be a list of strings, not {prompts!r}")
    if not prompts:
        raise ConvFusionError("there are no prompts to draw: at least one is needed")


def stock_denoiser(pipe: Any) -> Denoiser:
    """The denoiser of a pipeline whose self-attention stands.

    Raises:
        ConvFusionError: it is converted.
    """
    model = denoiser_of(pipe)
    if mixers_of(model):
        raise ConvFusionError("this model is converted: revert it to look at its self-attention")
    return model


@contextmanager
def counted_calls(model: Denoiser, on_call: Callable[[], Any] | None) -> Iterator[None]:
    """Call a function after each call of a denoiser; what it returns does not matter."""

    def count(*_: Any) -> None:
        if on_call is not None:
            on_call()

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attention_capture(
    pipe: Any, timesteps: list[float], settings: Measure, padding: Sequence[Tensor] = ()
) -> Iterator[dict[str, Captured]]:
    """Measure every self-attention at these timesteps of whatever the pipeline draws inside.

    Queries and keys are projected a second time beside the model's own forward pass, which goes
    on untouched: pictures are bit-equal with and without. What is seen of each site, summed over
    pictures and the halves of classifier-free guidance, is in the yielded dictionary.

    Args:
        pipe: the pipeline.
        timesteps: to look at.
        settings: what to measure.
        padding: a list that holds, while a batch is drawn, [P, T] of its prompts and of as many
            empty ones, true where a token of the text is padding.

    Raises:
        ConvFusionError: the model is converted; inside, a map that is not finite.
    """
    model = stock_denoiser(pipe)
    seen: dict[str, Captured] = {}
    now: list[float] = []  # the timestep of the call at hand, if it is one to look at

    def see_timestep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = call_timestep(model, args, kwargs, timesteps)
        now[:] = [] if timestep is None else [timestep]

    def see(site: Site, attention: Any, given: TokenSample) -> None:
        for timestep in now:
            if site.path not in seen:
                seen[site.path] = Captured.blank(given.grid, settings, given.tokens)
            try:
                told = _match_padding(padding, len(given.tokens), family_of(model).prompted)
                seen[site.path].add(attention, given, timestep, settings, told)
            except ConvFusionError as error:
                raise ConvFusionError(f"{site.path}, timestep {timestep}: {error}") from None

    handle = model.register_forward_pre_hook(see_timestep, with_kwargs=True)
    try:
        with watch_attention(model, see):
            yield seen
    finally:
        handle.remove()


def _match_padding(padding: Sequence[Tensor], rows: int, prompted: int) -> Tensor | None:
    """The padding of each row of a batch: of prompts, with empty ones beside them if guided."""
    if not padding:
        return None
    told, empty = padding
    if rows == len(told):
        return told
    if rows != 2 * len(told):
        return None
    return torch.cat([empty, told] if prompted == -1 else [told, empty])


def call_timestep(
    model: Denoiser, args: tuple, kwargs: dict[str, Any], timesteps: Sequence[float]
) -> float | None:
    """Which of these timesteps a denoiser is called at; of a batch, at its first. None: at another.

    Some pipelines give them in the dtype of the denoiser, which is compared after like rounding.
    """
    family = family_of(model)
    if family.times in kwargs:
        value = kwargs[family.times]
    else:
        value = args[argument_position(type(model), family.times)]
    given = torch.as_tensor(value).flatten()[0]
    for timestep in timesteps:
        told: Any = timestep
        if given.is_floating_point():
            told = family.tell(torch.tensor(timestep).to(given))
        if as_timestep(told) == as_timestep(given):
            return timestep
    return None


@contextmanager
def recorded_calls(pipe: Any, timesteps: list[float]) -> Iterator[list[DenoiserCall]]:
    """Keep what the denoiser was given and gave at these timesteps of a sampling inside."""
    model = denoiser_of(pipe)
    calls: list[DenoiserCall] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        timestep = call_timestep(model, args, kwargs, timesteps)
        if timestep is not None:
            tensor = stack_samples(output[0] if isinstance(output, tuple) else output.sample)
            calls.append(DenoiserCall(timestep, args, dict(kwargs), tensor))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
