"""`--budget`: the options of it, and the choice, for every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.errors import ConvFusionError

if TYPE_CHECKING:
    from convfusion.budget import Allocation

Within = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Choose what stands at each site so that the error is least within this: 4x, for 4 "
        "times fewer operations, or 0.8s, for seconds of all sites in one call of the denoiser.",
    ),
]
MomentsFile = Annotated[
    Path | None,
    typer.Option(
        "--moments",
        help="JSON file of what replacing each site costs, as measured. It is read, or written "
        "with --measure. Without it, --budget gives all sites equal ranks.",
    ),
]
Keep = Annotated[
    int,
    typer.Option(
        min=0, help="With --budget: keep the attention at so many sites, the dearest to replace."
    ),
]


def check_budget(budget: str | None, moments: Path | None, keep: int) -> None:
    """Raise a ConvFusionError for a budget that is none, or options that go with one."""
    from convfusion.budget import parse_budget

    if budget is None:
        if moments is not None or keep:
            raise ConvFusionError("--moments and --keep go with --budget")
        return
    parse_budget(budget)


def choose_within(
    pipe_or_model: Any,
    budget: str,
    moments: Path | None,
    keep: int,
    latents: tuple[int, int] | None,
    batch: int = 2,
) -> Allocation:
    """The choice within a budget, by the moments of a file if there is one."""
    from convfusion.budget import Moments, choose_mixers

    read = None if moments is None else Moments.load(moments)
    return choose_mixers(
        pipe_or_model, budget, moments=read, size=latents, keep=keep, batch=batch
    )
