"""How long a self-attention and what stands in its place take, alone and in the whole denoiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convfusion.bench.timing import Timing, time_interleaved
from convfusion.families import Denoiser, Site, example_inputs, list_sites
from convfusion.mixers.base import TokenMixer, as_plain
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.mixers.joint import stand_in
from convfusion.mixers.tokens import Grid
from convfusion.shapes import (
    SiteCall,
    find_joint_calls,
    latents_of_grid,
    shape_of_site,
    stock_on_meta,
)
from convfusion.surgery import build_mixers, install, revert
from convfusion.surgery.config import ConvertConfig
from convfusion.surgery.mixed import MixedAttention, put_mixer

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PARITY_TOKENS = 24 * 24  # at most: a double-precision run of the real grid would take too long

Run = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """Something that can stand at the sites.

    Attributes:
        config: the mixers that stand in for the attention; None for the attention itself, which
            runs on the fastest backend that PyTorch's SDPA finds.
        compiled: by `torch.compile`, for each size anew.
    """

    config: ConvertConfig | None = None
    compiled: bool = False


@dataclass(frozen=True)
class SiteKind:
    """Sites of a denoiser that cost the same: one of them is timed for all.

    Attributes:
        site: the first of them.
        kernel_size: of the ΔConvBlock that the config puts there; None where it puts none.
        paths: of them all.
    """

    site: Site
    kernel_size: int | None
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What was found for a variant: a timing, or a note that says why there is none.

    Attributes:
        timing: None if it was not timed.
        parity: ‖y − y'‖/‖y'‖ of its output to the reference.
        note: why it was not timed.
    """

    timing: Timing | None
    parity: float | None = None
    note: str = ""


def site_kinds(model: Denoiser, config: ConvertConfig) -> list[SiteKind]:
    """The kinds of sites of an unconverted denoiser under a config, in module order."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in list_sites(model):
        mixer = config.mixer_for(site.path)
        groups.setdefault((*shape_of_site(model, site), mixer), []).append(site)
    return [
        SiteKind(
            sites[0],
            mixer.kernel_size if isinstance(mixer, DeltaConv) else None,
            tuple(site.path for site in sites),
        )
        for (*_, mixer), sites in groups.items()
    ]


def time_site(
    model: Denoiser,
    site: Site,
    variants: Mapping[str, Variant],
    grid: Grid,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),
    backward: bool = False,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Measured]:
    """Time what can stand at one site, on random tokens and with random weights.

    A variant is timed only if its output agrees with its own plain form in double precision, on
    a grid of at most 24×24 tokens. Attention with rotary embeddings is timed without turning its
    queries and keys. Where text and image share the attention, all of it is timed, with as many
    tokens of text as a pipeline gives, and with what turns its queries and keys.

    Args:
        model: an unconverted denoiser that has the site; on the meta device it costs nothing.
        site: of it.
        variants: by name.
        grid: (H, W) or (T, H, W) of the tokens.
        batch: samples.
        dtype: of weights and tokens.
        device: where they lie.
        backward: work out the gradients of tokens and weights too.
        rounds: counted ones.
        seed: of weights and tokens.
    """
    results: dict[str, Measured] = {}
    calls: dict[str, Run] = {}
    given = make_call(model, site, grid, batch, dtype, device, seed)
    small = _shrink(grid)
    tried = given if small == grid else make_call(model, site, small, batch, dtype, device, seed)
    for name, variant in variants.items():
        module = site_module(model, site, variant.config, seed).to(device, dtype)
        forward = _forward(module, variant.compiled)
        error = _parity(module, forward, tried)
        if error > TOLERANCES[dtype]:
            results[name] = Measured(None, error, f"its output is off by {error:.1e}")
            continue
        results[name] = Measured(None, error)
        calls[name] = _step(forward, given, module, backward)
        if variant.compiled:
            calls[name]()
    timings = time_interleaved(calls, device, rounds)
    return {
        name: Measured(timings.get(name), each.parity, each.note) for name, each in results.items()
    }


def make_call(
    model: Denoiser,
    site: Site,
    grid: Grid,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> SiteCall:
    """What an attention of a site is called with, of random values; arguments as of `time_site`.

    Where text and image share it, the shapes are those that the denoiser calls it with.
    """
    generator = torch.Generator().manual_seed(seed)
    if site.joint is None:
        tokens = torch.randn(batch, math.prod(grid), site.channels, generator=generator)
        return SiteCall((tokens.to(device, dtype),), {}, grid)
    shapes = nn.Module.to(copy.deepcopy(stock_on_meta(model)), dtype)
    latents = latents_of_grid(shapes, site, grid)
    call = find_joint_calls(shapes, latents, [site], batch=batch)[site.path]

    def fill(each: Tensor) -> Tensor:
        """What is no shape alone, such as where tokens lie, has its values."""
        if not each.is_meta:
            return each.to(device)
        if not (each.is_floating_point() or each.is_complex()):
            return torch.ones(each.shape, dtype=each.dtype, device=device)  # as a mask
        drawn = torch.complex64 if each.is_complex() else torch.float32
        return torch.randn(each.shape, generator=generator, dtype=drawn).to(device, each.dtype)

    return call.map(fill)


def _shrink(grid: Grid) -> Grid:
    """A grid of at most `PARITY_TOKENS` tokens: the longest side is halved until it is one."""
    sides = list(grid)
    while math.prod(sides) > PARITY_TOKENS:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return tuple(sides)


def site_module(
    model: Denoiser, site: Site, config: ConvertConfig | None, seed: int = 0
) -> nn.Module:
    """A self-attention like that of a site, or its mixer, on the CPU with random weights."""
    attention = copy.deepcopy(model.get_submodule(site.path)).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer in attention.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
            else:  # a norm of diffusers' own
                for weight in layer.parameters(recurse=False):
                    nn.init.ones_(weight)
        mixer = None if config is None else config.mixer_for(site.path)
        if mixer is None:
            return attention
        built = site.build(mixer)
        if site.joint is None:
            built.init_from(as_plain(attention))
            return built
        built.init_from(stand_in(site.channels, site.heads))
        put_mixer(attention, built, site.path, site.joint)
    return attention


def _forward(module: nn.Module, compiled: bool) -> Callable[[SiteCall], Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    run = torch.compile(forward, dynamic=False) if compiled else forward

    def call(given: SiteCall) -> Any:
        if isinstance(module, TokenMixer):
            return run(*given.args, given.grid)
        shared = isinstance(module, MixedAttention)
        return run(*given.args, **(given.with_grid() if shared else given.kwargs))

    return call


@torch.no_grad()
def _parity(module: nn.Module, forward: Callable[[SiteCall], Any], given: SiteCall) -> float:
    exact = _forward(copy.deepcopy(module).double(), False)(given.map(_lengthen))
    found = forward(given)
    reference, output = (
        torch.cat([each.double().flatten() for each in tree_leaves(both)])
        for both in (exact, found)
    )
    return ((output - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def _lengthen(each: Tensor) -> Tensor:
    if each.is_complex():
        return each.to(torch.complex128)
    return each.double() if each.is_floating_point() else each


def _step(
    forward: Callable[[SiteCall], Any], given: SiteCall, module: nn.Module, backward: bool
) -> Run:
    if not backward:
        return torch.no_grad()(lambda: forward(given))
    given = given.map(lambda each: each.detach().requires_grad_(_holds_tokens(each)))
    wanted = [*(each for each in given.list_tensors() if each.requires_grad), *module.parameters()]

    def run() -> Any:
        outputs = tree_leaves(forward(given))
        total = sum(each.sum() for each in outputs)
        return torch.autograd.grad(total, wanted, allow_unused=True)

    return run


def _holds_tokens(each: Tensor) -> bool:
    return each.ndim == 3 and each.is_floating_point()


def time_denoiser(
    model: Denoiser,
    variants: Mapping[str, Variant],
    latents: tuple[int, int],
    *,
    batch: int = 2,
    backward: bool = False,
    recorded: bool = False,
    rounds: int = 3,
    warm_up: bool = True,
    on_call: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Time whole forward passes of a denoiser with each variant at its sites in turn.

    Args:
        model: unconverted; it comes back as it was.
        variants: by name.
        latents: (height, width).
        batch: samples; two are one picture under classifier-free guidance.
        backward: work out the gradients of the latents and of what stands at the sites too.
        recorded: time the replays of a CUDA graph of each variant: what the GPU does, without what
            Python takes to ask for it.
        rounds: counted ones.
        warm_up: call each once before, uncounted.
        on_call: told the name of a variant before each of its calls.
    """
    inputs = example_inputs(model, latents, batch=batch)
    device = next(model.parameters()).device
    calls = {name: denoiser_call(model, v, inputs, backward) for name, v in variants.items()}
    if recorded:
        calls = {name: record_graph(call) for name, call in calls.items()}
    timings = time_interleaved(calls, device, rounds, on_call, warm_up)
    return {name: Measured(timing) for name, timing in timings.items()}


def denoiser_call(
    model: Denoiser, variant: Variant, inputs: dict[str, Any], backward: bool = False
) -> Run:
    """One forward pass with a variant at the sites, which are as they were when it is over."""
    mixers: dict[str, TokenMixer] = {}
    if variant.config is not None:
        mixers = build_mixers(model, list_sites(model), variant.config)
    forward = torch.compile(model, dynamic=False) if variant.compiled else model

    def run() -> None:
        with replaced_sites(model, mixers), torch.set_grad_enabled(backward):
            if not backward:
                forward(**inputs)
                return
            sample = next(iter(inputs.values())).requires_grad_()
            weights = [p for mixer in mixers.values() for p in mixer.parameters()]
            outputs = tree_leaves(forward(**inputs))  # a ControlNet has several
            torch.autograd.grad(sum(each.sum() for each in outputs), [sample, *weights])

    return run


def record_graph(call: Run) -> Run:
    """The replay of a call on a CUDA device, recorded after three calls that warm it up."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def replaced_sites(model: Denoiser, mixers: dict[str, TokenMixer]) -> Iterator[None]:
    """Let ready mixers stand at the sites of an unconverted denoiser for a while."""
    if not mixers:
        yield
        return
    install(model, mixers, keep_attention=True)
    try:
        yield
    finally:
        revert(model)
