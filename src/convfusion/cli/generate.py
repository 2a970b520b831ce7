"""`convfusion generate`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.models import guidance_for, load_pipeline
from convfusion.cli.options import Blocks, Device, Model, Precision, Revision, Size, parse_size


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
    hybrid: Annotated[
        bool,
        typer.Option(
            help="Measure first, and use the attention wherever it is the cheaper one at this size."
        ),
    ] = False,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw pictures. `mini` draws with its shipped student, `mini-teacher` with attention."""
    from convfusion import checkpoint
    from convfusion.generate import check_size
    from convfusion.generate import generate as run

    pipe = load_pipeline(model, precision, device, revision)
    if blocks is not None:
        checkpoint.load(pipe, blocks)
    wanted = parse_size(size) if size else None
    if wanted:
        check_size(pipe, wanted)
    seeds = [seed + i for i in range(len(prompt))]
    out.mkdir(parents=True, exist_ok=True)
    guidance = guidance_for(model) if guidance is None else guidance
    with with_cheaper_attention(pipe, wanted) if hybrid else nullcontext():
        images = run(pipe, prompt, seeds=seeds, steps=steps, guidance=guidance, size=wanted)
    first = len(list(out.glob("*.png")))
    for i, (image, number) in enumerate(zip(images, seeds, strict=True)):
        path = out / f"{first + i:05d}-seed{number}.png"
        image.save(path)
        typer.echo(str(path))


def with_cheaper_attention(pipe: Any, size: tuple[int, int] | None) -> AbstractContextManager[None]:
    """Let the attention stand in at the sites where it is the cheaper one at a size in pixels."""
    from convfusion.adapters import denoiser_of
    from convfusion.bench.plan import cheaper_attention
    from convfusion.conditioning import latent_scale
    from convfusion.surgery import attention_back, mixers_of

    scale = latent_scale(pipe)
    height, width = size or (denoiser_of(pipe).config.sample_size * scale,) * 2
    kept = cheaper_attention(pipe, (height // scale, width // scale))
    typer.echo(f"The attention is the cheaper one at {len(kept)} of {len(mixers_of(pipe))} sites.")
    return attention_back(pipe, kept)
