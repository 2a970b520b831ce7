"""What replacing the attention of each site would cost in quality, as measured, in a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.files import few, read_json, write_text
from convfusion.mixers import Grid, Halo
from convfusion.mixers.halo import Sides

SCHEMA = "convfusion-moments-1"


class Reach(NamedTuple):
    """How far a halo block sees.

    Attributes:
        block: side of the squares of queries that share a window, in tokens; of videos, the sides
            along each axis, as in `Halo`.
        window: side of their window.
        cells: of the pooled tokens, along a side.
    """

    block: Sides
    window: Sides
    cells: Sides


class RatioError(NamedTuple):
    """The error that a share of the channels of each head leaves.

    Attributes:
        ratio: of the channels that are kept.
        error: imitation error.
    """

    ratio: float
    error: float


class ReachError(NamedTuple):
    """The error that a reach leaves, with all channels.

    Attributes:
        reach: of the block.
        error: imitation error.
    """

    reach: Reach
    error: float


@dataclass(frozen=True)
class SiteMoments:
    """What was measured at one site.

    Every error is an imitation error, E‖b(x) − a(x)‖²/Var a(x) of a block b as it starts from the
    attention a, without training.

    Attributes:
        path: of the site.
        channels, heads: of the site.
        grid: of the tokens that were seen.
        scores: of queries and keys cut to a share of their channels.
        values: of values cut to a share of their channels.
        far: of a window and pooled tokens, with all channels.
        delta_conv: of a ΔConvBlock with a kernel of 7 that starts as the mean attention.
        mean_only: of the mean token alone.
        sensitivity: the ε-error of the denoiser with this site alone replaced, for each unit of
            imitation error.
    """

    path: str
    channels: int
    heads: int
    grid: Grid
    scores: tuple[RatioError, ...]
    values: tuple[RatioError, ...]
    far: tuple[ReachError, ...]
    delta_conv: float
    mean_only: float
    sensitivity: float

    def __post_init__(self) -> None:
        _check_site(self)


@dataclass(frozen=True)
class Moments:
    """What was measured at every site of a denoiser.

    Attributes:
        teacher: fingerprint of the denoiser with its attention.
        latents: (height, width) of the latents that it was measured with; of a video with the
            frames before them.
        sites: in the order of the model.
    """

    teacher: str
    latents: Grid
    sites: tuple[SiteMoments, ...]

    def __post_init__(self) -> None:
        paths = [site.path for site in self.sites]
        if not paths or len(set(paths)) < len(paths):
            raise ConvFusionError("moments are of one site or more, each of them once")

    @property
    def by_path(self) -> dict[str, SiteMoments]:
        return {site.path: site for site in self.sites}

    def save(self, path: str | Path) -> None:
        """Write them as JSON.

        Raises:
            CheckpointError: they cannot be written.
        """
        write_text(Path(path), json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it holds something else than moments.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise CheckpointError(f"{path} holds no moments: its schema is not {SCHEMA}")
        try:
            return _read_moments({k: v for k, v in content.items() if k != "schema"})
        except ConvFusionError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None


def _read_moments(values: Mapping[str, Any]) -> Moments:
    _check_names(values, Moments, "moments")
    sites = values["sites"]
    if not isinstance(values["teacher"], str) or not isinstance(sites, list):
        raise ConvFusionError("`teacher` is a fingerprint, and `sites` a list")
    return Moments(
        teacher=values["teacher"],
        latents=_read_sides(values["latents"], "latents"),
        sites=tuple(_read_site(site) for site in sites),
    )


def _read_site(values: Any) -> SiteMoments:
    _check_names(values, SiteMoments, "a site")
    if not isinstance(values["path"], str):
        raise ConvFusionError(f"the path of a site is no text: {values['path']!r}")
    where = values["path"]
    return SiteMoments(
        path=where,
        channels=_read_count(values["channels"], f"channels of {where}"),
        heads=_read_count(values["heads"], f"heads of {where}"),
        grid=_read_sides(values["grid"], f"grid of {where}"),
        scores=_read_ratios(values["scores"], f"scores of {where}"),
        values=_read_ratios(values["values"], f"values of {where}"),
        far=_read_reaches(values["far"], f"far of {where}"),
        **{
            name: _read_number(values[name], f"{name} of {where}")
            for name in ("delta_conv", "mean_only", "sensitivity")
        },
    )


def _read_ratios(values: Any, what: str) -> tuple[RatioError, ...]:
    rows = _read_rows(values, what)
    return tuple(RatioError(_read_number(a, what), _read_number(b, what)) for a, b in rows)


def _read_reaches(values: Any, what: str) -> tuple[ReachError, ...]:
    rows = []
    for reach, error in _read_rows(values, what):
        if not isinstance(reach, list) or len(reach) != len(Reach._fields):
            raise ConvFusionError(f"{what}: a reach is {', '.join(Reach._fields)}, not {reach!r}")
        block, window, cells = (_read_reach(sides, what) for sides in reach)
        rows.append(ReachError(Reach(block, window, cells), _read_number(error, what)))
    return tuple(rows)


def _read_reach(value: Any, what: str) -> Sides:
    """One side for every axis, or one for each."""
    if isinstance(value, list):
        return tuple(_read_count(side, what) for side in value)
    return _read_count(value, what)


def _read_rows(values: Any, what: str) -> Sequence[Sequence[Any]]:
    if isinstance(values, list) and all(isinstance(v, list) and len(v) == 2 for v in values):
        return values
    raise ConvFusionError(f"{what} is a list of pairs")


def _read_sides(values: Any, what: str) -> Grid:
    if not isinstance(values, list) or len(values) not in (2, 3):
        raise ConvFusionError(
            f"{what} is a height and a width, of a video behind its frames, not {values!r}"
        )
    return tuple(_read_count(side, what) for side in values)


def _read_count(value: Any, what: str) -> int:
    if type(value) is not int or value < 1:
        raise ConvFusionError(f"{what}: a positive whole number is needed, not {value!r}")
    return value


def _read_number(value: Any, what: str) -> float:
    if type(value) not in (int, float):
        raise ConvFusionError(f"{what}: a number is needed, not {value!r}")
    return float(value)


def _check_names(values: Any, kind: type, what: str) -> None:
    names = {each.name for each in fields(kind)}
    if not isinstance(values, dict):
        raise ConvFusionError(f"{what}: an object is needed, not {values!r}")
    if names != values.keys():
        odd = names ^ values.keys()
        raise ConvFusionError(f"{what} lacks or has too much: {few(map(str, odd))}")


def _check_site(site: SiteMoments) -> None:
    for name in ("scores", "values", "far"):
        rows: Sequence[tuple[Any, float]] = getattr(site, name)
        keys = [key for key, _ in rows]
        if not rows or len(set(keys)) < len(keys):
            raise ConvFusionError(f"{name} of {site.path}: each once, and at least one")
        for _, error in rows:
            _check_error(error, f"{name} of {site.path}")
    for reach, _ in site.far:
        Halo(*reach)  # which says what is wrong with its sides
    for ratio, _ in (*site.scores, *site.values):
        if not 0 < ratio <= 1:
            raise ConvFusionError(f"a ratio at {site.path} is not between 0 and 1: {ratio!r}")
    for name in ("delta_conv", "mean_only", "sensitivity"):
        _check_error(getattr(site, name), f"{name} of {site.path}")


def _check_error(error: float, what: str) -> None:
    if not (math.isfinite(error) and error >= 0):
        raise ConvFusionError(f"{what}: an error is finite and not negative, not {error!r}")
