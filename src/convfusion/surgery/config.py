"""What `convert` is asked to do, as plain frozen data that round-trips through JSON."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from convfusion.errors import ConvFusionError
from convfusion.files import read_json, write_text
from convfusion.mixers import Mixer, mixer_from_dict, mixer_to_dict
from convfusion.mixers.delta_conv import DeltaConv


@dataclass(frozen=True)
class ConvertConfig:
    """Which token mixer goes to which self-attention site.

    Attributes:
        sites: from a pattern over site paths (`*`, `?`, `[…]` as in shell patterns) to the
            settings of a mixer. The first pattern that matches a path decides; a site that no
            pattern matches keeps its attention.
        keep_attention: keep the replaced attention beside the mixer, so that `revert` works and
            every stock weight and name stays. False frees its memory.
        seed: of the mixers' random numbers; the global random state is left alone.
    """

    sites: Mapping[str, Mixer] = field(default_factory=lambda: {"*": DeltaConv()})
    keep_attention: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.keep_attention) is not bool or type(self.seed) is not int:
            raise ConvFusionError("`keep_attention` must be true or false, and `seed` an integer")
        if _is_mixer(self.sites):
            raise ConvFusionError("`sites` maps patterns to mixers; one for all is uniform(mixer)")
        if not isinstance(self.sites, Mapping) or not self.sites:
            raise ConvFusionError("`sites` must map at least one pattern to a mixer")
        for pattern, mixer in self.sites.items():
            if not isinstance(pattern, str):
                raise ConvFusionError(f"a pattern of `sites` must be a string, not {pattern!r}")
            check_mixer(mixer)

    def mixers_for(self, paths: Iterable[str]) -> dict[str, Mixer]:
        """The mixer of every path that a pattern matches, in the order of the paths.

        Raises:
            ConvFusionError: a pattern matches no path at all.
        """
        paths = list(paths)
        for pattern in self.sites:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ConvFusionError(
                    f"the pattern {pattern!r} matches no self-attention site; "
                    f"there are {len(paths)}, such as {paths[0]!r}"
                )
        chosen = {path: self.mixer_for(path) for path in paths}
        return {path: mixer for path, mixer in chosen.items() if mixer is not None}

    def mixer_for(self, path: str) -> Mixer | None:
        """The mixer of one site, or None if it keeps its attention."""
        matching = (m for pattern, m in self.sites.items() if fnmatchcase(path, pattern))
        return next(matching, None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": {pattern: mixer_to_dict(mixer) for pattern, mixer in self.sites.items()},
            "keep_attention": self.keep_attention,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvertConfig:
        if not isinstance(values, Mapping):
            raise ConvFusionError(f"a convert config is an object with `sites`, not {values!r}")
        unknown = set(values) - {"sites", "keep_attention", "seed"}
        if unknown:
            raise ConvFusionError(f"unknown in a convert config: {', '.join(sorted(unknown))}")
        config = dict(values)
        if "sites" in config:
            if not isinstance(config["sites"], Mapping):
                raise ConvFusionError("`sites` must map patterns to mixers")
            config["sites"] = {p: mixer_from_dict(m) for p, m in config["sites"].items()}
        return cls(**config)

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ConvertConfig:
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it is no JSON.
            ConvFusionError: it holds something else than a config.
        """
        return cls.from_dict(read_json(Path(path)))


def checked_config(config: Any) -> ConvertConfig:
    """A `ConvertConfig` as it is; of anything else, a ConvFusionError says what to give."""
    if isinstance(config, ConvertConfig):
        return config
    if _is_mixer(config):
        hint = "for one mixer everywhere, give uniform(mixer)"
    elif isinstance(config, Mapping):
        made = "ConvertConfig.from_dict(…)" if "sites" in config else "ConvertConfig(sites=…)"
        hint = f"for this dictionary, give {made}"
    elif isinstance(config, str | Path):
        hint = f"for this file, give ConvertConfig.load({str(config)!r})"
    elif isinstance(config, int):
        hint = f"for a kernel size, give with_kernel_sizes({config})"
    else:
        hint = "give one, the name of a preset, or None"
    raise ConvFusionError(f"{_kind_of(config)} is no ConvertConfig: {hint}")


def check_mixer(mixer: Any) -> None:
    """Raise a ConvFusionError that says what to give, unless something is settings of a mixer."""
    if isinstance(mixer, type):
        raise ConvFusionError(f"{mixer.__name__} is a class: give its settings, {mixer.__name__}()")
    if isinstance(mixer, int):
        raise ConvFusionError(
            f"{mixer} is no mixer: for kernel sizes, give with_kernel_sizes(…) or DeltaConv"
            f"(kernel_size={mixer})"
        )
    if not _is_mixer(mixer):
        raise ConvFusionError(f"{mixer!r} is no mixer, such as DeltaConv(kernel_size=9)")


def _is_mixer(thing: Any) -> bool:
    """Whether something is the settings of a mixer, or a class of them."""
    return callable(getattr(thing, "build", None))


def _kind_of(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def uniform(mixer: Mixer, **options: Any) -> ConvertConfig:
    """One mixer for every site: `uniform(DeltaConv(kernel_size=9))`."""
    return ConvertConfig(sites={"*": mixer}, **options)


def with_kernel_sizes(
    sizes: int | Mapping[str, int], base: DeltaConv = DeltaConv(), **options: Any
) -> ConvertConfig:
    """ΔConvBlocks whose kernel is one number, or given by site pattern.

    Raises:
        ConvFusionError: sizes are neither, or one of them is no kernel size.
    """
    by_site = {"*": sizes} if isinstance(sizes, int) else sizes
    if not isinstance(by_site, Mapping):
        raise ConvFusionError(
            f"kernel sizes are an integer, or integers by site pattern, not {sizes!r}"
        )
    if not isinstance(base, DeltaConv):
        raise ConvFusionError(f"`base` must be settings, DeltaConv(…), not {base!r}")
    return ConvertConfig(
        sites={site: replace(base, kernel_size=size) for site, size in by_site.items()}, **options
    )


def select_sites(config: ConvertConfig, paths: Iterable[str]) -> ConvertConfig:
    """The config for these sites alone, each with the mixer that the config has for it.

    Raises:
        ConvFusionError: there is no site, or one that the config does not convert.
    """
    sites = {}
    for path in paths:
        mixer = config.mixer_for(path)
        if mixer is None:
            raise ConvFusionError(f"the config converts no site called {path!r}")
        sites[glob.escape(path)] = mixer
    if not sites:
        raise ConvFusionError("choose at least one site to convert")
    return replace(config, sites=sites)


def select_every(
    config: ConvertConfig, paths: Iterable[str], n: int, first: int = 0
) -> ConvertConfig:
    """The config for every n-th of the sites that it converts, from site number `first` on.

    Args:
        config: as for all sites.
        paths: of all sites of the model, in their order.
        n: at least 1, which is all of them.
        first: counted from 0.

    Raises:
        ConvFusionError: n or first is out of range.
    """
    converted = list(config.mixers_for(paths))
    if n < 1 or not 0 <= first < len(converted):
        raise ConvFusionError(
            f"every {n} from {first} on chooses none of {len(converted)} sites: "
            f"the first must lie between 0 and {len(converted) - 1}, and n be at least 1"
        )
    return select_sites(config, converted[first::n])
