"""Operations of models whose text and image share their attention: what goes, and what stays.

Of such an attention a mixer replaces what goes from image to image alone. Its projections stay, and
what involves the text, so that its operations are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from convfusion.bench.counts import (
    denoiser_operations,
    list_contenders,
    site_cost,
)
from convfusion.bench.models import BenchModel
from convfusion.families import Denoiser, Site, list_sites, site_grid
from convfusion.files import write_csv
from convfusion.mixers import Mixer
from convfusion.mixers.tokens import Grid
from convfusion.operations import JointCounter
from convfusion.surgery.config import ConvertConfig

SIZES = ((1024, 1024), (2048, 2048), (4096, 4096))  # (height, width) in pixels


@dataclass(frozen=True)
class JointCost:
    """Operations of one forward of a denoiser for one sample, before and after a conversion.

    Attributes:
        model: name.
        width, height: of the picture, in pixels.
        mixer: name of the contender.
        tokens: N of the image, at the last shared attention.
        words: T of the text there, as its pipeline pads it.
        image_before, image_after: from image to image at all shared attentions, without
            projections.
        text: from image to text and the rows of the text; it stays.
        projections: of the shared attentions; they stay.
        alone_before, alone_after: of self-attentions that the image has for itself beside them,
            with their projections; 0 where there are none.
        denoiser_before, denoiser_after: of everything.
    """

    model: str
    width: int
    height: int
    mixer: str
    tokens: int
    words: int
    image_before: int
    image_after: int
    text: int
    projections: int
    alone_before: int
    alone_after: int
    denoiser_before: int
    denoiser_after: int


def count_joint(
    model: BenchModel,
    sizes: Iterable[tuple[int, int]] = SIZES,
    configs: Mapping[str, ConvertConfig | None] | None = None,
) -> list[JointCost]:
    """A row for every size and contender.

    Args:
        model: some of whose attentions text and image share.
        sizes: (height, width) of pictures in pixels.
        configs: by name of the contender, as of `list_contenders`; None of them is the attention.

    Raises:
        ConvFusionError: a size that the model cannot draw, or a mixer that does not fit.
    """
    configs = list_contenders(model) if configs is None else configs
    wanted = {name: config for name, config in configs.items() if config is not None}
    sites = list_sites(model.denoiser)
    rows = []
    for size in sizes:
        latents = model.latents(size)
        before = denoiser_operations(model, size)
        counter = JointCounter(model.denoiser, latents)
        last = [site for site in sites if site.joint][-1]  # the first ones may see no text
        words = counter.read_tokens(last).text.key.shape[2]
        tokens = math.prod(site_grid(model.denoiser, last, latents))
        for name, config in wanted.items():
            parts = _sum_up(model.denoiser, sites, config, counter, latents)
            after = before + sum(parts[what + "_after"] - parts[what + "_before"] for what in _GOES)
            where = (model.name, size[1], size[0], name, tokens, words)
            rows.append(JointCost(*where, **parts, denoiser_before=before, denoiser_after=after))
    return rows


_GOES = ("image", "alone")  # what a mixer takes the place of


def _sum_up(
    model: Denoiser,
    sites: Sequence[Site],
    config: ConvertConfig,
    counter: JointCounter,
    latents: Grid,
) -> dict[str, Any]:
    """Operations of all sites before and after, by the part that they are of."""
    sums = dict.fromkeys(
        ("image_before", "image_after", "text", "projections", "alone_before", "alone_after"), 0
    )
    known: dict[tuple[int, int, Grid, Mixer | None], int] = {}
    for site in sites:
        mixer = config.mixer_for(site.path)
        if site.joint:
            stock = counter.count(site)
            sums["image_before"] += stock.image
            sums["image_after"] += counter.count(site, mixer).image
            sums["text"] += stock.text
            sums["projections"] += stock.projections
            continue
        grid = site_grid(model, site, latents)
        for when, there in (("alone_before", None), ("alone_after", mixer)):
            key = (site.channels, site.heads, grid, there)
            if key not in known:
                known[key] = site_cost(model.get_submodule(site.path), there, grid)[0]
            sums[when] += known[key]
    return sums


def has_joint_sites(model: BenchModel) -> bool:
    """Whether text and image share some of its attentions."""
    return any(site.joint for site in list_sites(model.denoiser))


def write_joint(rows: Sequence[JointCost], path: Path) -> None:
    """Rows as CSV."""
    write_csv(path, [column.name for column in fields(JointCost)], map(asdict, rows))
