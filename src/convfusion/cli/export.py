"""`convfusion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.console import print_ending
from convfusion.cli.models import choose_guidance, equip, open_pipeline
from convfusion.cli.options import Blocks, Model
from convfusion.progress import announced

Target = Annotated[
    Path, typer.Option(help="File to write, ending in .onnx; with --pipeline a folder.")
]
Whole = Annotated[
    bool,
    typer.Option(
        "--pipeline",
        help="Write a folder with text encoder, denoiser, VAE decoder and scheduler settings, "
        "which draws without PyTorch.",
    ),
]


def export(
    model: Model,
    out: Target,
    pipeline: Whole = False,
    blocks: Blocks = None,
) -> None:
    """Write a converted denoiser as ONNX, for pictures of any size, and compare it with PyTorch.

    With --pipeline, write everything that drawing needs.
    """
    from convfusion.export import check_folder, check_target, export_onnx, export_pipeline

    (check_folder if pipeline else check_target)(out)
    pipe = open_pipeline(model, "float32", "cpu")
    if blocks is not None:
        equip(pipe, blocks, None)
    with announced("Tracing, writing and comparing with PyTorch …", True):
        if pipeline:
            whole = export_pipeline(pipe, out, guidance=choose_guidance(model, pipe))
        else:
            written = export_onnx(pipe, out)
    if pipeline:
        for part, error in whole.errors.items():
            typer.echo(f"{part}: differs from PyTorch by {error:.1e}")
        print_ending(out, verdict="examples/onnx_generate.py draws with this folder.")
        return
    for (batch, height, width), error in written.errors.items():
        typer.echo(f"latents {batch}×{height}×{width}: differs from PyTorch by {error:.1e}")
    print_ending(out, verdict=f"Inputs: {', '.join(written.inputs)}.")
