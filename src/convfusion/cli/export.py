"""`convfusion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.console import print_ending
from convfusion.cli.models import check_blocks, equip, open_pipeline
from convfusion.cli.options import Blocks, Model
from convfusion.progress import announced

Onnx = Annotated[Path, typer.Option(help="File to write, ending in .onnx.")]


def export(
    model: Model,
    out: Onnx,
    blocks: Blocks = None,
) -> None:
    """Write a converted denoiser as ONNX, for pictures of any size, and compare it with PyTorch."""
    from convfusion.export import check_target, export_onnx

    check_target(out)
    check_blocks(blocks)
    pipe = open_pipeline(model, "float32", "cpu")
    if blocks is not None:
        equip(pipe, blocks, None)
    with announced("Tracing, writing and comparing with PyTorch …", True):
        written = export_onnx(pipe, out)
    for (batch, height, width), error in written.errors.items():
        typer.echo(f"latents {batch}×{height}×{width}: differs from PyTorch by {error:.1e}")
    print_ending(out, verdict=f"Inputs: {', '.join(written.inputs)}.")
