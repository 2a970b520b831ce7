"""Operations, parameters and memory of self-attention and its rivals, from shapes alone.

Everything is worked out on the meta device, for one sample, at any size of picture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convfusion.bench.models import BenchModel
from convfusion.errors import ConvFusionError
from convfusion.families import (
    Denoiser,
    Site,
    count_sequences,
    example_inputs,
    family_of,
    list_sites,
    site_grid,
)
from convfusion.files import write_csv
from convfusion.mixers import MIXERS, Mixer
from convfusion.mixers.base import as_plain, projections
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.mixers.tokens import Grid
from convfusion.operations import JointCounter, count, mixer_operations, peak_bytes
from convfusion.shapes import shape_of_site
from convfusion.surgery.config import ConvertConfig, uniform
from convfusion.surgery.presets import choose_preset, get_preset

SIZES = (
    *((side, side) for side in (256, 512, 1024, 2048, 4096, 8192, 16384)),
    (2160, 4096),
    (8640, 15360),
)  # (height, width) in pixels
ATTENTION = "attention"
RIVALS = ("delta_conv", "halo", "linfusion", "neighbourhood", "tome")
RANKS = ((1 / 8, 3 / 8), (1 / 4, 1 / 2), (1 / 2, 1 / 2))  # of scores and values, over a head's d
COUNTED = (
    "Counted: matrix products, convolutions and attention, two operations per multiply-add, of one "
    "sample; not norms, gates, pooling and interpolation. Windowed attention counts its windows.",
    "Memory: the most that the tensors of one site take at once in float16, without weights and "
    "attention scores; of halo blocks as on a GPU, which works 65,536 tokens at a time.",
)
COUNTED_JOINT = (
    "Where text and image share an attention, its projections and all that involves the text stay, "
    "and count on both sides: a mixer replaces what goes from image to image alone. Halo blocks "
    "work 8,192 tokens at a time there."
)
EVERY = "all"  # the place of a total
WHOLE = "denoiser"  # and of all that a denoiser works out


@dataclass(frozen=True)
class Cost:
    """What one site costs with one mixer at one size of picture, for one sample.

    Attributes:
        model: name.
        width, height: of the picture, in pixels.
        mixer: `attention`, or the name of a contender.
        place: the part of the model, such as `down_blocks.0`; `all` is a total over the sites, and
            `denoiser` over all layers. What stays of an attention that text and image share counts
            with whatever stands there.
        sites: how many sites of that place cost the same, or all that a total sums up.
        channels: C of the tokens; 0 in a total.
        tokens: N of a sequence; 0 in a total.
        operations: of one forward of one site; in a total, of all sites.
        parameters: likewise.
        activation_bytes: the most that the tensors of one site take at once, in float16
            (`convfusion.operations.peak_bytes`); in a total, at the worst site.
    """

    model: str
    width: int
    height: int
    mixer: str
    place: str
    sites: int
    channels: int
    tokens: int
    operations: int
    parameters: int
    activation_bytes: int


def list_contenders(
    model: BenchModel,
    kinds: Sequence[str] | None = None,
    ratios: Sequence[float] = (0.5,),
    ranks: Sequence[tuple[float, float]] = RANKS[1:2],
) -> dict[str, ConvertConfig | None]:
    """What to compare, by name: the attention (None), and a config for every rival.

    Args:
        model: ΔConvBlocks take the kernels of its preset.
        kinds: names in `convfusion.mixers.MIXERS`, with their default settings; by default those
            of `RIVALS` that work on grids of the model's rank.
        ratios: channel ratios of the ΔConvBlocks, each a contender.
        ranks: key and value ratios of the halo blocks, each a contender.

    Raises:
        ConvFusionError: an unknown kind, or a ratio that no block can have.
    """
    compared: dict[str, ConvertConfig | None] = {ATTENTION: None}
    family, sites = family_of(model.denoiser), list_sites(model.denoiser)
    joint = [site for site in sites if site.joint]
    for kind in [k for k in RIVALS if _works_on(k, sites)] if kinds is None else kinds:
        if kind not in MIXERS:
            raise ConvFusionError(f"no mixer {kind!r}; there are {', '.join(MIXERS)}")
        if kind == "halo":
            whole = replace(family.halo, key_ratio=1.0, value_ratio=1.0)
            for key, value in ranks if len(joint) < len(sites) else [(1, 1)]:
                config = uniform(replace(family.halo, key_ratio=key, value_ratio=value))
                shared = {site.path: whole for site in joint}
                compared[f"{kind} {key:g} {value:g}"] = ConvertConfig({**shared, **config.sites})
        elif kind == "delta_conv":
            preset = get_preset(choose_preset(model.denoiser)).sites
            blocks: dict[str, Any] = {site.path: DeltaConv() for site in joint}
            blocks |= {path: mixer for path, mixer in preset.items() if type(mixer) is DeltaConv}
            for ratio in ratios:
                compared[f"{kind} {ratio:g}"] = ConvertConfig(
                    {path: replace(mixer, ratio=ratio) for path, mixer in blocks.items()}
                )
        else:
            _check_joint(MIXERS[kind](), joint)
            compared[kind] = uniform(MIXERS[kind]())
    return compared


def _works_on(kind: str, sites: Sequence[Site]) -> bool:
    """Whether a mixer works at all sites, with its default settings or a family's."""
    if kind in ("delta_conv", "halo"):
        return True
    settings = MIXERS[kind]()
    knows_text = hasattr(settings, "build_joint") or not any(site.joint for site in sites)
    return knows_text and sites[0].rank in settings.build(2, 1).ranks


def _check_joint(settings: Mixer, joint: Sequence[Site]) -> None:
    """Raise a ConvFusionError for a mixer that knows nothing of a text, where there is one."""
    for site in joint[:1]:
        with torch.device("meta"):
            site.build(settings)


def denoiser_operations(model: BenchModel, size: tuple[int, int]) -> int:
    """Operations of a whole forward pass for one picture of (height, width) pixels."""
    denoiser = model.denoiser
    return count(denoiser, **example_inputs(denoiser, model.latents(size)))


def operation_table(
    model: BenchModel,
    sizes: Iterable[tuple[int, int]] = SIZES,
    configs: Mapping[str, ConvertConfig | None] | None = None,
) -> list[Cost]:
    """The cost of every contender at every place of a model, for pictures of (height, width).

    A site that a config leaves alone costs what its attention costs.

    Raises:
        ConvFusionError: a size that the model cannot draw, or a block that does not fit its
            channels.
    """
    configs = list_contenders(model) if configs is None else configs
    latents = {size: model.latents(size) for size in sizes}
    groups = _groups(model, configs)
    plain = {(g.first.channels, g.first.heads): g.first for g in groups if not g.first.joint}
    joint = [group.first for group in groups if group.first.joint]
    short = _in_float16(model.denoiser) if joint else model.denoiser
    sequences = count_sequences(model.denoiser, groups[0].first)

    @cache  # the same at every place of so many channels and tokens
    def cost(channels: int, heads: int, mixer: Any, grid: Grid) -> tuple[int, int, int]:
        attention = model.denoiser.get_submodule(plain[channels, heads].path)
        return site_cost(attention, mixer, grid, sequences)

    rows = []
    for size, of_latents in latents.items():
        counter = JointCounter(short, of_latents, joint)
        for group, (number, label) in product(groups, enumerate(configs)):
            site, mixer = group.first, group.mixers[number]
            grid = site_grid(model.denoiser, site, of_latents)
            if site.joint:
                numbers = joint_cost(counter, site, mixer)
            else:
                numbers = cost(site.channels, site.heads, mixer, grid)
            what = (model.name, size[1], size[0], label, group.place, group.sites, site.channels)
            rows.append(Cost(*what, math.prod(grid), *numbers))
    return rows


def _in_float16(denoiser: Denoiser) -> Denoiser:
    """A copy whose every layer is, which diffusers warns of."""
    return nn.Module.to(copy.deepcopy(denoiser), torch.float16)


def joint_cost(counter: JointCounter, site: Site, mixer: Mixer | None) -> tuple[int, int, int]:
    """As `site_cost`, of a site that text and image share, with all that stays of it.

    Args:
        counter: of a denoiser in float16.
        site: of it.
        mixer: settings of what takes the place of its image-to-image attention; None for nothing.
    """
    module, call = counter.build(site, mixer), counter.find_call(site)
    parameters = sum(p.numel() for p in module.parameters())
    peak = peak_bytes(module, *call.args, **(call.kwargs if mixer is None else call.with_grid()))
    return counter.count(site, mixer).whole, parameters, peak


@dataclass
class _Group:
    """Sites of one place that cost the same with every contender."""

    place: str
    first: Site
    mixers: tuple[Any, ...]  # settings of each contender's mixer; None for the attention
    sites: int = 0


def _groups(model: BenchModel, configs: Mapping[str, ConvertConfig | None]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for site in list_sites(model.denoiser):
        in_unet = ".attentions." in site.path
        place = site.path.partition(".attentions." if in_unet else ".")[0]
        mixers = tuple(c.mixer_for(site.path) if c else None for c in configs.values())
        alike = (place, shape_of_site(model.denoiser, site), mixers)
        groups.setdefault(alike, _Group(place, site, mixers)).sites += 1
    return list(groups.values())


def site_cost(
    attention: Any, mixer: Mixer | None, grid: Grid, sequences: int = 1
) -> tuple[int, int, int]:
    """Operations, parameters and activation bytes (float16) of one site, for one sample.

    Args:
        attention: the diffusers `Attention` of the site, on the meta device.
        mixer: settings of what stands in its place; None for the attention itself.
        grid: of its tokens.
        sequences: of tokens on such a grid, for one sample.
    """
    channels, count_of_tokens = projections(attention)[0].in_features, math.prod(grid)
    with torch.device("meta"):
        tokens = torch.empty(sequences, count_of_tokens, channels, dtype=torch.float16)
        heads = as_plain(attention).heads
        module = mixer.build(channels, heads) if mixer else copy.deepcopy(attention)
    module = module.to(torch.float16)
    inputs = (tokens, grid) if mixer else (tokens,)
    operations = mixer_operations(module, tokens, grid) if mixer else count(module, tokens)
    parameters = sum(p.numel() for p in module.parameters())
    return operations, parameters, peak_bytes(module, *inputs)


def add_totals(costs: Iterable[Cost]) -> list[Cost]:
    """All sites of a model together, for every mixer and size."""
    whole: dict[tuple[Any, ...], list[Cost]] = {}
    for cost in costs:
        whole.setdefault((cost.model, cost.width, cost.height, cost.mixer), []).append(cost)
    return [
        replace(
            parts[0],
            place=EVERY,
            sites=sum(part.sites for part in parts),
            channels=0,
            tokens=0,
            operations=sum(part.sites * part.operations for part in parts),
            parameters=sum(part.sites * part.parameters for part in parts),
            activation_bytes=max(part.activation_bytes for part in parts),
        )
        for parts in whole.values()
    ]


def whole_costs(model: BenchModel, totals: Iterable[Cost]) -> list[Cost]:
    """The whole denoiser with what stands at its sites, for every mixer and size.

    Args:
        model: that the totals are of.
        totals: of `add_totals`; the memory of a site stays.
    """
    by_size: dict[tuple[int, int], list[Cost]] = {}
    for cost in totals:
        by_size.setdefault((cost.height, cost.width), []).append(cost)
    weights = sum(parameter.numel() for parameter in model.denoiser.parameters())
    found = []
    for size, costs in by_size.items():
        (attention,) = (cost for cost in costs if cost.mixer == ATTENTION)
        others = denoiser_operations(model, size) - attention.operations
        found += [
            replace(
                cost,
                place=WHOLE,
                operations=others + cost.operations,
                parameters=weights - attention.parameters + cost.parameters,
            )
            for cost in costs
        ]
    return found


def compare_with_attention(costs: Sequence[Cost]) -> list[float | None]:
    """For each cost, the attention's operations over its own, same model, size and place."""

    def where(cost: Cost) -> tuple[Any, ...]:
        return (cost.model, cost.width, cost.height, cost.place, cost.channels, cost.tokens)

    attention = {where(cost): cost.operations for cost in costs if cost.mixer == ATTENTION}
    return [attention[where(cost)] / cost.operations if cost.operations else None for cost in costs]


def write_costs(costs: Sequence[Cost], path: Path, whole: Sequence[Cost] = ()) -> None:
    """Costs, their totals and whole denoisers as CSV, each with attention's operations over its."""
    rows = [
        asdict(cost) | {"attention_over": "" if ratio is None else f"{ratio:.6g}"}
        for part in (costs, add_totals(costs), whole)
        for cost, ratio in zip(part, compare_with_attention(part), strict=True)
    ]
    write_csv(path, [*(column.name for column in fields(Cost)), "attention_over"], rows)
