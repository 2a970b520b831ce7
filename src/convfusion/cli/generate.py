"""`convfusion generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.models import guidance_for, load_pipeline
from convfusion.cli.options import Blocks, Device, Model, Precision, Size, parse_size


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to draw; give it again for more.")],
    blocks: Blocks = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Size = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 5, and 3 for `mini`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = 0,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw pictures. `mini` draws with its shipped student, `mini-teacher` with attention."""
    from convfusion import checkpoint
    from convfusion.generate import check_size
    from convfusion.generate import generate as run

    pipe = load_pipeline(model, precision, device)
    if blocks is not None:
        checkpoint.load(pipe, blocks)
    wanted = parse_size(size) if size else None
    if wanted:
        check_size(pipe, wanted)
    seeds = [seed + i for i in range(len(prompt))]
    out.mkdir(parents=True, exist_ok=True)
    guidance = guidance_for(model) if guidance is None else guidance
    images = run(pipe, prompt, seeds=seeds, steps=steps, guidance=guidance, size=wanted)
    first = len(list(out.glob("*.png")))
    for i, (image, number) in enumerate(zip(images, seeds, strict=True)):
        path = out / f"{first + i:05d}-seed{number}.png"
        image.save(path)
        typer.echo(str(path))
