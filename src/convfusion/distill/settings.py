"""A run as a file: which model, which data, how it is converted and distilled."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from convfusion.distill.config import DistillConfig
from convfusion.errors import ConvFusionError
from convfusion.settings import check_fields, check_names
from convfusion.text import read_text, split_lines, toml_string

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Recipe = Literal["convfusion", "paper"]


@dataclass(frozen=True)
class RunSettings:
    """Everything that the command line needs for a run; '' is not given.

    Attributes:
        model: a diffusers pipeline, folder or Hub name; `mini` is the embedded model.
        revision: branch, tag or commit of a Hub name.
        precision: dtype that the model is loaded in: `float32`, `bfloat16` or `float16`.
        data: a source of pictures or prompts, or a cache.
        size: WIDTHxHEIGHT of the training pictures, by default the model's own.
        frames: of each clip, by default the model's own (0).
        buckets: keep the ratio of sides of the pictures, about.
        config: preset or JSON file of the conversion, by default that of the model's layout.
        every: convert only every so many-th of the sites.
        first: of them, counted from 0.
        recipe: what the fields of `distill` that are not set are: `convfusion`, the defaults of
            `DistillConfig`, or `paper`, those of `DistillConfig.paper()`.
        distill: see `DistillConfig`.
    """

    model: str = ""
    revision: str = ""
    precision: str = "float32"
    data: str = ""
    size: str = ""
    frames: int = 0
    buckets: bool = False
    config: str = ""
    every: int = 1
    first: int = 0
    recipe: Recipe = "convfusion"
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.every < 1 or self.first < 0 or self.frames < 0:
            raise ConvFusionError("every must be at least 1, and first and frames not negative")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSettings:
        """From plain values, with those of `DistillConfig` in `distill`."""
        check_names(cls, values, "a run")
        settings = values.get("distill", {})
        if not isinstance(settings, Mapping):
            raise ConvFusionError("`distill` must be a table of settings")
        if values.get("recipe") == "paper":
            settings = merge_settings(DistillConfig.paper().to_dict(), settings)
        return cls(**{**values, "distill": DistillConfig.from_dict(settings)})


def read_settings(path: str | Path | None, options: Mapping[str, Any]) -> RunSettings:
    """The settings of a TOML file, overruled by options; without a file, the options alone.

    Args:
        path: of the file, or None.
        options: fields of `RunSettings`, of which those that are None are left out; `distill`
            holds fields of `DistillConfig`, and its `losses` those of `LossWeights`.

    Raises:
        ConvFusionError: the file cannot be read or is no TOML, a field is unknown or of the wrong
            kind, or a value is out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads("\n".join(split_lines(read_text(Path(path)))))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConvFusionError(f"{path} is no TOML: {error}") from None
        try:
            RunSettings.from_dict(values)
        except ConvFusionError as error:
            raise ConvFusionError(f"{path}: {error}") from None
    return RunSettings.from_dict(merge_settings(values, options))


def run_settings(out: str | Path) -> Path:
    """Where a run of the command line keeps its settings, within its folder."""
    return Path(out) / "run.toml"


def merge_settings(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with changes, table by table; a change to None is none."""
    merged = dict(values)
    for name, value in changes.items():
        if isinstance(value, Mapping):
            inner = merged.get(name, {})
            merged[name] = merge_settings(inner, value) if isinstance(inner, Mapping) else inner
        elif value is not None:
            merged[name] = value
    return merged


def as_toml(settings: RunSettings) -> str:
    """Settings as a TOML file that `read_settings` reads back."""
    lines = [
        f"{each.name} = {_literal(getattr(settings, each.name))}"
        for each in fields(settings)
        if each.name != "distill"
    ]
    config = settings.distill.to_dict()
    losses = config.pop("losses")
    lines += ["", "[distill]", *(f"{name} = {_literal(v)}" for name, v in config.items())]
    lines += ["", "[distill.losses]", *(f"{name} = {_literal(v)}" for name, v in losses.items())]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return toml_string(value) if isinstance(value, str) else repr(value)
