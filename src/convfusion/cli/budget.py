"""`--budget`: the options of it, and the choice, for every command that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.clips import choose_frames
from convfusion.cli.options import check_file
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress

if TYPE_CHECKING:
    from convfusion.budget import Allocation, Moments
    from convfusion.mixers.tokens import Grid

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


def check_budget(
    budget: str | None, moments: Path | None, keep: int, *, measured: bool = False
) -> None:
    """Raise a ConvFusionError for a budget that is none, or options that do not go together.

    Args:
        budget, moments, keep: the options.
        measured: whether moments are measured, and written to the file.
    """
    from convfusion.budget import parse_budget

    if measured:
        check_file(moments)
    if budget is not None:
        parse_budget(budget)
    elif keep or (moments is not None and not measured):
        raise ConvFusionError("--moments and --keep go with --budget")


def measure_and_save(pipe: Any, file: Path | None, calls: Sequence[Mapping[str, Any]]) -> Moments:
    """Moments measured with calls of a pipeline's denoiser, and written if there is a file."""
    from convfusion.budget import measure_moments

    with Progress(True) as progress:
        bar = progress.add("measuring each site")
        found = measure_moments(
            pipe, calls, on_site=lambda done, total: bar.update(done, total=total)
        )
    if file is not None:
        found.save(file)
    return found


def read_moments(file: Path | None) -> Moments | None:
    """The moments of a file, if there is one."""
    from convfusion.budget import Moments

    return None if file is None else Moments.load(file)


def latents_of(pipe: Any, size: tuple[int, int], frames: int | None = None) -> Grid:
    """(height, width) of the latents of a size in pixels, behind their frames if these are told.

    Args:
        pipe: a pipeline.
        size: (height, width) in pixels.
        frames: of a clip; None leaves them out.

    Raises:
        ConvFusionError: no such pictures or clips can be drawn.
    """
    from convfusion.families import frame_scale, latent_scale
    from convfusion.generate import check_size

    check_size(pipe, size)
    scale = latent_scale(pipe)
    sides = size[0] // scale, size[1] // scale
    if frames is None:
        return sides
    choose_frames(pipe, frames)
    return (frames - 1) // frame_scale(pipe) + 1, *sides


def choose_within(
    pipe_or_model: Any,
    budget: str,
    moments: Moments | None,
    keep: int,
    latents: Grid | None,
    batch: int = 2,
) -> Allocation:
    """The choice within a budget, which is timed where that is in seconds."""
    from convfusion.budget import choose_mixers

    return choose_mixers(
        pipe_or_model, budget, moments=moments, size=latents, keep=keep, batch=batch
    )


def choose_conversion_within(
    pipe: Any,
    budget: str | None,
    file: Path | None,
    keep: int,
    latents: Grid | None,
    calls: Sequence[Mapping[str, Any]],
) -> tuple[Allocation | None, Moments | None]:
    """What `convert` puts into a pipeline, which is printed, and the moments that it rests on.

    Without a budget nothing is chosen; moments are measured where a file is to hold them.
    """
    found = None
    if budget is not None or file is not None:
        found = measure_and_save(pipe, file, calls) if calls else read_moments(file)
    if budget is None:
        return None, found
    chosen = choose_within(pipe, budget, found, keep, latents)
    typer.echo(str(chosen))
    return chosen, found


def print_expected(
    chosen: Allocation | None, moments: Moments | None, imitation: Mapping[str, float]
) -> None:
    """Predicted against measured: what the blocks that were set let expect."""
    if chosen is None or moments is None:
        return
    expected = chosen.expect(imitation, moments)
    typer.echo(
        f"ε-error of the whole: {chosen.epsilon_error:.2e} predicted for this choice, "
        f"{expected:.2e} by the errors of the blocks as they were set."
    )
