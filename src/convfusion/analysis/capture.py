"""Watch the self-attention of a pipeline while it draws, without touching what it draws."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.adapters import Denoiser, Site, adapter_for, denoiser_of, list_sites
from convfusion.analysis.streaming import AttentionSums, Measure, measure_attention
from convfusion.block import Grid
from convfusion.errors import ConvFusionError
from convfusion.surgery import mixers_of


@dataclass
class Captured:
    """What was seen of one site.

    Attributes:
        grid: (H, W) of its tokens.
        by_timestep: sums over pictures at each timestep: of the heads and, last, their mean.
        mean_map: [Q, N] float32 on the model's device, the mean over heads of the chosen queries
            summed over pictures and timesteps; `maps` says how many went in.
    """

    grid: Grid
    by_timestep: dict[int, AttentionSums]
    mean_map: Tensor
    maps: int = 0


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser during sampling: what went in, by position and name, and came out."""

    timestep: int
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def noisy(self) -> Tensor:
        """The latents that went in, [B, C, h, w]."""
        if self.args:
            return self.args[0]
        return self.kwargs["sample" if "sample" in self.kwargs else "hidden_states"]


def sampling_timesteps(pipe: Any, steps: int) -> list[int]:
    """The timesteps that a pipeline's scheduler visits in so many steps, rounded."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return list(dict.fromkeys(round(float(t)) for t in scheduler.timesteps))


def choose_timesteps(pipe: Any, steps: int, wanted: tuple[int, ...] | None) -> list[int]:
    """The wanted timesteps in sampling order; by default five, spread over the schedule.

    Raises:
        ConvFusionError: the scheduler does not visit a wanted one.
    """
    visited = sampling_timesteps(pipe, steps)
    if wanted is None:
        count = min(5, len(visited))
        return [visited[(2 * i + 1) * len(visited) // (2 * count)] for i in range(count)]
    unknown = [t for t in wanted if t not in visited]
    if unknown or not wanted:
        raise ConvFusionError(
            f"{', '.join(map(str, unknown)) or 'no timestep'} is not among the timesteps of "
            f"{steps} sampling steps: {', '.join(map(str, visited))}"
        )
    return [t for t in visited if t in wanted]


@contextmanager
def attention_capture(
    pipe: Any, timesteps: list[int], settings: Measure
) -> Iterator[dict[str, Captured]]:
    """Measure every self-attention at these timesteps of whatever the pipeline draws inside.

    Queries and keys are projected a second time beside the model's own forward pass, which goes
    on untouched: pictures are bit-equal with and without. What is seen of each site, summed over
    pictures and the halves of classifier-free guidance, is in the yielded dictionary.

    Raises:
        ConvFusionError: the model is converted; inside, a map that is not finite.
    """
    model = denoiser_of(pipe)
    sites = list_sites(model)
    if mixers_of(model):
        raise ConvFusionError("this model is converted: revert it to analyse its self-attention")
    watch = _Watch(model, timesteps, settings)
    try:
        watch.attach(sites)
        yield watch.seen
    finally:
        watch.detach()


@dataclass
class _Watch:
    """The hooks of a capture, and what they have seen."""

    model: Denoiser
    timesteps: list[int]
    settings: Measure
    seen: dict[str, Captured] = field(default_factory=dict)  # by site path
    timestep: int | None = None  # of the call at hand, if it is one to look at
    grids: dict[str, Grid] = field(default_factory=dict)  # by path of the owner
    handles: list[Any] = field(default_factory=list)

    def attach(self, sites: list[Site]) -> None:
        def hook(module: nn.Module, function: Callable) -> None:
            self.handles.append(module.register_forward_pre_hook(function, with_kwargs=True))

        hook(self.model, self.see_timestep)
        for owner in dict.fromkeys(site.owner for site in sites):
            hook(self.model.get_submodule(owner), self.grid_reader(owner))
        for site in sites:
            hook(self.model.get_submodule(site.path), self.attention_reader(site))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def see_timestep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = call_timestep(self.model, args, kwargs)
        self.timestep = timestep if timestep in self.timesteps else None

    def grid_reader(self, owner: str) -> Callable:
        grid_hook = adapter_for(self.model).grid_hook(self.model)

        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.grids[owner] = grid_hook.grid(args, kwargs)

        return read

    def attention_reader(self, site: Site) -> Callable:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.timestep is not None:
                tokens = args[0] if args else kwargs["hidden_states"]
                self.add(site, module, tokens)

        return read

    @torch.no_grad()
    def add(self, site: Site, attention: Any, tokens: Tensor) -> None:
        grid, timestep = self.grids[site.owner], self.timestep
        assert timestep is not None
        if site.path not in self.seen:
            queries = len(self.settings.chosen_queries(grid))
            blank = torch.zeros(queries, tokens.shape[1], device=tokens.device)
            self.seen[site.path] = Captured(grid, {}, blank)
        found = self.seen[site.path]
        if found.grid != grid:
            raise ConvFusionError("analyse pictures of one size at a time")
        for query, key in zip(*project(attention, tokens), strict=True):
            try:
                sums = measure_attention(
                    query, key, attention.scale, grid, self.settings, found.mean_map
                )
            except ConvFusionError as error:
                raise ConvFusionError(f"{site.path}, timestep {timestep}: {error}") from None
            before = found.by_timestep.get(timestep)
            found.by_timestep[timestep] = sums if before is None else before + sums
            found.maps += 1


def project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of a diffusers `Attention` for tokens [B, N, C], each [B, h, N, C/h]."""
    parts = []
    for layer, norm in ((attention.to_q, "norm_q"), (attention.to_k, "norm_k")):
        heads = layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        normalise = getattr(attention, norm, None)
        parts.append(heads if normalise is None else normalise(heads))
    return parts[0], parts[1]


def call_timestep(model: Denoiser, args: tuple, kwargs: dict[str, Any]) -> int:
    """The timestep of a denoiser call, rounded; of a batch, its first."""
    value = kwargs["timestep"] if "timestep" in kwargs else args[_timestep_position(model)]
    return round(float(torch.as_tensor(value).flatten()[0]))


def _timestep_position(model: Denoiser) -> int:
    names = list(inspect.signature(type(model).forward).parameters)
    return names.index("timestep") - 1  # without self


@contextmanager
def recorded_calls(pipe: Any, timesteps: list[int]) -> Iterator[list[DenoiserCall]]:
    """Keep what the denoiser was given and gave at these timesteps of a sampling inside."""
    model = denoiser_of(pipe)
    calls: list[DenoiserCall] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        timestep = call_timestep(model, args, kwargs)
        if timestep in timesteps:
            tensor = output[0] if isinstance(output, tuple) else output.sample
            calls.append(DenoiserCall(timestep, args, dict(kwargs), tensor))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
