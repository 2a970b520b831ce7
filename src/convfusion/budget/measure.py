"""Measure what replacing each attention would cost: blocks that start from it, without training.

One pass over the calls keeps some of the tokens of every site. From them halo blocks of several
ranks and reaches are set, as `convert` with measured calls would, and compared with the attention.
Then each site alone is replaced in the denoiser, which tells how much of an error at the site
reaches its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from convfusion.budget.candidates import REACHES, covers, set_delta_conv, set_halo
from convfusion.budget.moments import Moments, RatioError, Reach, ReachError, SiteMoments
from convfusion.errors import ConvFusionError
from convfusion.evaluate.epsilon import relative_error
from convfusion.families import (
    Denoiser,
    Site,
    denoiser_of,
    family_of,
    list_sites,
    noisy_latents,
    stack_samples,
)
from convfusion.families.watch import attention_at, sample_attention
from convfusion.fingerprint import fingerprint
from convfusion.mixers import Grid, MeanOnly, Mixer
from convfusion.mixers.base import TokenMixer
from convfusion.mixers.tokens import TokenSample
from convfusion.shapes import latents_of_grid
from convfusion.surgery import build_mixers, install, mixers_of, revert, uniform
from convfusion.surgery.start import MEMORY, measure_imitation, start_mixer

RATIOS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)
WINDOWS = ((4, 6), (4, 8), (4, 10), (4, 12), (8, 16))  # of blocks of queries, and of their windows
CELLS = (1, 4, 8)
VIDEO_WINDOWS = tuple(((2, 4, 4), window) for window in ((2, 8, 8), (4, 8, 8), (6, 12, 12)))
VIDEO_CELLS = ((1, 1, 1), (3, 4, 4), (3, 8, 8))
PICTURES = 16  # of a site, that errors are measured on
TOKENS = 2**13  # of those pictures, that are worked on at once
CALLS = 8  # that sensitivities are measured with
SMALL = 1e-6  # an imitation error that is rounding, of which no sensitivity follows

OnSite = Callable[[int, int], None]


@torch.no_grad()
def measure_moments(
    pipe_or_model: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    memory: float = MEMORY,
    seed: int = 0,
    on_site: OnSite | None = None,
) -> Moments:
    """Measure what replacing each self-attention would cost in quality.

    The model is left as it was.

    Args:
        pipe_or_model: a pipeline or denoiser that is not converted.
        calls: keyword arguments of the denoiser, such as `recording.record_calls` gives; some dozen
            pictures over all timesteps are enough.
        memory: GiB on the CPU for tokens, over all sites.
        seed: of the choice of tokens, and of the calls for sensitivities.
        on_site: called with the sites that are measured, and all.

    Raises:
        ConvFusionError: the model is converted, there are no calls, or a block cannot start from
            its attention.
    """
    model = denoiser_of(pipe_or_model)
    if mixers_of(model):
        raise ConvFusionError("this model is converted: revert it before measuring")
    sites = list_sites(model)
    chosen = CallReservoir(CALLS, seed)
    with sample_attention(model, [site.path for site in sites], memory, seed) as samples:
        for call in calls:
            chosen.add(call, model(**call))
    if not chosen.kept:
        raise ConvFusionError("no call of the model was given to measure with")
    measured = []
    for done, site in enumerate(sites, 1):
        change = partial(_output_error, model, site, chosen.kept)
        measured.append(measure_site(model, site, samples.pop(site.path), change))
        if on_site is not None:
            on_site(done, len(sites))
    return Moments(fingerprint(model), _find_sides(model, chosen.kept[0][0]), tuple(measured))


def _find_sides(model: Denoiser, call: Mapping[str, Any]) -> Grid:
    """Sides of the latents of a call, packed or not."""
    latents = stack_samples(noisy_latents(model, (), call))
    if latents.ndim > 3:
        return tuple(latents.shape[2:] if family_of(model).frames else latents.shape[-2:])
    grid = family_of(model).carrier(model).grid((), dict(call))
    return latents_of_grid(model, list_sites(model)[0], grid)


class CallReservoir:
    """A few calls and their outputs, of which each that was seen has the same chance.

    Args:
        most: calls that are kept.
        seed: of the choice.

    Attributes:
        kept: arguments and the first output of each call that was kept.
    """

    def __init__(self, most: int, seed: int = 0) -> None:
        self.kept: list[tuple[Mapping[str, Any], Tensor]] = []
        self._most, self._seen = most, 0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, call: Mapping[str, Any], output: Any) -> None:
        """Look at a call and what the denoiser returned."""
        self._seen += 1
        pair = (call, stack_samples(output[0]))
        place = int(torch.randint(self._seen, (), generator=self._generator))
        if len(self.kept) < self._most:
            self.kept.append(pair)
        elif place < self._most:
            self.kept[place] = pair


def measure_site(
    model: Denoiser,
    site: Site,
    sample: Sequence[TokenSample],
    change: Callable[[TokenMixer], float],
) -> SiteMoments:
    """Measure what replacing one self-attention would cost in quality.

    Where text and image share it, ranks are not cut, since its projections stay.

    Args:
        model: not converted; nothing of it is looked at except the site's attention.
        site: of it.
        sample: tokens that the site was seen with.
        change: the ε-error of the denoiser with a mixer at this site alone.
    """
    grid, sample = sample[0].grid, gather_pictures(sample)

    def error(mixer: Mixer) -> float:
        return _start(model, site, mixer, sample)[1]

    seen = {reach: error(set_halo(reach, 1.0, 1.0)) for reach in list_reaches(grid)}
    farthest, least = list(seen.items())[-1]

    def more(key_ratio: float, value_ratio: float) -> float:
        """What a cut adds to the error of a block that sees far, and has all channels."""
        if key_ratio == value_ratio == 1.0:
            return 0.0
        return max(0.0, error(set_halo(farthest, key_ratio, value_ratio)) - least)

    ratios = (1.0,) if site.joint else RATIOS
    middling = (1.0, 1.0) if site.joint else (0.25, 0.5)
    block, middle = _start(model, site, set_halo(REACHES[site.rank], *middling), sample)
    if site.joint and middle <= SMALL:  # its window holds the whole grid
        block, middle = _start(model, site, set_delta_conv(site.rank), sample)
    changed = change(block)
    return SiteMoments(
        path=site.path,
        channels=site.channels,
        heads=site.heads,
        grid=grid,
        scores=tuple(RatioError(ratio, more(ratio, 1.0)) for ratio in ratios),
        values=tuple(RatioError(ratio, more(1.0, ratio)) for ratio in ratios),
        far=tuple(ReachError(reach, left) for reach, left in seen.items()),
        delta_conv=error(set_delta_conv(site.rank)),
        mean_only=error(MeanOnly()),
        sensitivity=changed / middle if middle > SMALL else 0.0,
    )


def gather_pictures(sample: Sequence[TokenSample], most: int = PICTURES) -> list[TokenSample]:
    """At most so many pictures of a sample, evenly spread over it, those of a grid in batches."""
    count = min(most, len(sample))
    batches: list[TokenSample] = []
    for number in range(count):
        next_one = sample[number * len(sample) // count]
        last = batches[-1] if batches else None
        alike = last is not None and _tell_kind(last) == _tell_kind(next_one)
        if last and alike and last.tokens[..., 0].numel() + next_one.tokens.shape[1] <= TOKENS:
            batches[-1] = _join(last, next_one)
        else:
            batches.append(next_one)
    return batches


def _tell_kind(sample: TokenSample) -> tuple[Any, ...]:
    """What samples have in common that make a batch: grid, rotary embedding, shape of a text."""
    parts = tree_leaves(sample.joint)
    return (
        sample.grid,
        id(sample.turn),
        [part if part is None else part.shape[1:] for part in parts],
    )


def _join(first: TokenSample, second: TokenSample) -> TokenSample:
    """Samples of one kind as one."""
    others: list[Tensor] = []

    def note(each: Tensor) -> Tensor:
        others.append(each)
        return each

    second.map(note)
    left = iter(others)
    return first.map(lambda each: torch.cat([each, next(left)]))


def list_reaches(grid: Grid) -> list[Reach]:
    """The reaches to measure on a grid, the nearest first; the last sees the farthest."""
    reaches = []
    windows, kinds = (WINDOWS, CELLS) if len(grid) == 2 else (VIDEO_WINDOWS, VIDEO_CELLS)
    for block, window in windows:
        for cells in kinds:
            reaches.append(Reach(block, window, cells))
            if covers(reaches[-1], grid):  # there is nothing beyond for cells to stand for
                return reaches
    return reaches


def _start(
    model: Denoiser, site: Site, settings: Mixer, sample: Sequence[TokenSample]
) -> tuple[TokenMixer, float]:
    """A mixer that starts from a site's attention, and its imitation error."""
    mixer = build_mixers(model, [site], uniform(settings))[site.path]
    attention = attention_at(model, site)
    if mixer.has_measured_start:
        return mixer, start_mixer(site.path, mixer, attention, sample)
    return mixer, measure_imitation(mixer, attention, sample)


def _output_error(
    model: Denoiser,
    site: Site,
    calls: Sequence[tuple[Mapping[str, Any], Tensor]],
    mixer: TokenMixer,
) -> float:
    """Mean relative squared error of what the denoiser predicts with one site replaced."""
    install(model, {site.path: mixer}, keep_attention=True)
    try:
        errors = []
        for call, taught in calls:
            latents = stack_samples(noisy_latents(model, (), call))
            channels = latents.shape[1]  # more are a learned variance
            learned = stack_samples(model(**call)[0])
            errors.append(relative_error(learned[:, :channels], taught[:, :channels]))
    finally:
        revert(model)
    return torch.cat(errors).mean().item()
