"""`convfusion cache`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.console import console, print_ending
from convfusion.cli.models import check_loading, choose_guidance, open_pipeline
from convfusion.cli.options import (
    Device,
    Frames,
    Model,
    Precision,
    Revision,
    Size,
    check_folder,
    parse_size,
)
from convfusion.progress import Progress

Pictures = Annotated[
    str,
    typer.Option(
        help="Pictures with captions: a folder, a table, tar shards or hf:NAME. Or a folder of "
        "clips. Or a .txt file of prompts, which the model then draws itself."
    ),
]
Continued = Annotated[
    Path, typer.Option(help="Folder for the cache. An unfinished cache is continued.")
]
Buckets = Annotated[
    bool,
    typer.Option(
        "--buckets/--no-buckets",
        help="Group pictures by their ratio of sides instead of cropping them to one size, and "
        "clips also by their length.",
    ),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures.")]
Encoded = Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")]
Half = Annotated[bool, typer.Option("--half", help="Store float16, which takes half the space.")]
ImageColumn = Annotated[
    str | None,
    typer.Option(help="Column of the pictures in a table, or their extension in shards."),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option(help="Column of the captions, or their extension or JSON field in shards."),
]
Split = Annotated[str | None, typer.Option(help="Split of a data set, such as train.")]
PerPrompt = Annotated[int, typer.Option(min=1, help="Pictures drawn of each prompt.")]
FirstSeed = Annotated[
    int, typer.Option(help="Seed of the first picture drawn; the following count up from it.")
]
DrawingSteps = Annotated[int, typer.Option(min=1, help="Sampling steps of pictures drawn.")]
DrawingGuidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale of pictures drawn. Default: 5, and 3 for `mini`."),
]


def cache(
    model: Model,
    data: Pictures,
    out: Continued,
    size: Size = None,
    frames: Frames = None,
    buckets: Buckets = False,
    workers: Workers = 4,
    batch_size: Encoded = 8,
    half: Half = False,
    image: ImageColumn = None,
    caption: CaptionColumn = None,
    split: Split = None,
    per_prompt: PerPrompt = 1,
    seed: FirstSeed = 0,
    steps: DrawingSteps = 25,
    guidance: DrawingGuidance = None,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Encode pictures or clips and their captions once, for `convfusion distill --data OUT`.

    If it is stopped, the same command continues it.
    """
    from convfusion.data.sources import Drawing, open_source

    check_folder(out)
    check_loading(precision, device)
    chosen = choose_guidance(model) if guidance is None else guidance
    drawing = Drawing(per_prompt, seed, steps, chosen)
    wanted = parse_size(size) if size else None
    source = open_source(data, image=image, caption=caption, split=split, drawing=drawing)
    pipe = open_pipeline(model, precision, device, revision)
    if guidance is None:
        source = fit_guidance(source, model, pipe)
    encode(
        pipe,
        source,
        out,
        size=wanted,
        frames=frames,
        buckets=buckets,
        num_workers=workers,
        batch_size=batch_size,
        half=half,
    )
    print_ending(
        out,
        next_command=("convfusion", "distill", model, "--data", out, "--out", "convfusion-blocks"),
    )


def fit_guidance(source: Any, model: str, pipe: Any) -> Any:
    """Prompts that are drawn with the default guidance of a pipeline; other sources as they are."""
    from convfusion.data.sources import Prompts

    if not isinstance(source, Prompts):
        return source
    return replace(source, drawing=replace(source.drawing, guidance=choose_guidance(model, pipe)))


def encode(pipe: Any, source: Any, out: Path, **options: Any) -> Any:
    """Build a cache with a progress bar, and say what is in it and what was skipped."""
    from convfusion.data import build_cache

    with Progress(True) as progress:
        bar = progress.add("encoding", total=source.total)
        built = build_cache(pipe, source, out, on_progress=bar.update, **options)
    print_cache(built)
    return built


def print_cache(built: Any) -> None:
    """Samples by size, and what was skipped."""
    from rich.table import Table

    from convfusion.data.chunks import format_size

    table = Table(title=f"{len(built)} samples")
    table.add_column("size")
    table.add_column("samples", justify="right")
    for size, group in zip(built.sizes, built.groups, strict=True):
        table.add_row(format_size(size), str(len(group)))
    console().print(table)
    if built.skipped:
        table = Table(title="Skipped")
        for column in ("reason", "samples", "the first of them"):
            table.add_column(column, justify="right" if column == "samples" else "left")
        for reason, entry in built.skipped.items():
            table.add_row(reason, str(entry["count"]), ", ".join(entry["names"][:3]))
        console().print(table)
