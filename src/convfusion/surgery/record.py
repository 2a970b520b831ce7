"""What blocks have been through: trained or not, from which start, for how many steps.

A conversion leaves blocks that know nothing. So that nobody draws with these by mistake, each mixer
carries a record, which training rewrites and which is saved and loaded with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

Origin = Literal["converted", "attention", "released", "unknown"]


@dataclass(frozen=True)
class TrainingRecord:
    """How a mixer came to its values.

    Attributes:
        origin: what the training began from: `converted`, as `convert` made it; `attention`, set by
            the attention that it replaces; `released`, trained by the paper's authors; or
            `unknown`, read from a file that does not say.
        steps: optimiser steps of this project's training since then.
    """

    origin: Origin = "converted"
    steps: int = 0

    @property
    def is_trained(self) -> bool:
        """Whether the mixer has learnt anything; a start alone is no training."""
        return self.steps > 0 or self.origin in ("released", "unknown")

    @property
    def is_started(self) -> bool:
        """Whether the mixer is anything else than what `convert` made."""
        return self.is_trained or self.origin != "converted"

    def __str__(self) -> str:
        if self.origin == "released":
            return "trained by others" + (f", then for {self.steps} steps" if self.steps else "")
        if self.steps:
            return f"trained for {self.steps} steps"
        return {
            "converted": "not trained",
            "attention": "not trained, started from the attention",
            "unknown": "trained for an unknown number of steps",
        }[self.origin]

    def to_dict(self) -> dict[str, Any]:
        """As a manifest has it: `trained` is false, or says the steps."""
        trained = {"steps": self.steps} if self.is_trained else False
        return {"trained": trained, "started_from": self.origin}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecord:
        """What a manifest says; one that says nothing, as of an earlier version, is `unknown`.

        Raises:
            ValueError: an entry is of the wrong kind.
        """
        if "trained" not in values:
            return cls("unknown")
        trained, origin = values["trained"], values.get("started_from", "unknown")
        steps = trained.get("steps") if isinstance(trained, Mapping) else 0
        if origin not in ("converted", "attention", "released", "unknown"):
            raise ValueError("`started_from`")
        if type(steps) is not int or steps < 0 or (trained is not False and type(trained) is bool):
            raise ValueError("`trained`")
        record = cls(origin, steps)
        if record.is_trained != (trained is not False):
            raise ValueError("`trained`")
        return record


UNTRAINED = TrainingRecord()
STARTED = TrainingRecord("attention")


def record_of(mixer: nn.Module) -> TrainingRecord:
    """What a mixer has been through."""
    new = STARTED if getattr(mixer, "starts_near", False) else UNTRAINED
    return getattr(mixer, "_convfusion_record", new)


def set_record(mixer: nn.Module, record: TrainingRecord) -> None:
    """Note what a mixer has been through; a deep copy of it keeps the note."""
    mixer._convfusion_record = record  # type: ignore[assignment]


def count_steps(mixers: Iterable[nn.Module], steps: int = 1) -> None:
    """Note further steps of training."""
    for mixer in mixers:
        record = record_of(mixer)
        set_record(mixer, replace(record, steps=record.steps + steps))


def least_trained(records: Iterable[TrainingRecord]) -> TrainingRecord:
    """Of several records the one of the least training; `UNTRAINED` of none."""
    return min(records, key=lambda r: (r.is_trained, r.is_started, r.steps), default=UNTRAINED)


def joint_record(mixers: Iterable[nn.Module]) -> TrainingRecord:
    """The record of the least trained of some mixers; those without parameters do not count."""
    return least_trained(record_of(mixer) for mixer in mixers if list(mixer.parameters()))
