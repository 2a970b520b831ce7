"""`convfusion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.models import load_pipeline
from convfusion.cli.options import Blocks, Model


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write, ending in .onnx.")],
    blocks: Blocks = None,
) -> None:
    """Write a converted denoiser as ONNX for any size, and compare it with PyTorch."""
    from convfusion import checkpoint
    from convfusion.export import check_target, export_onnx

    check_target(out)
    pipe = load_pipeline(model, "float32", "cpu")
    if blocks is not None:
        checkpoint.load(pipe, blocks)
    written = export_onnx(pipe, out)
    for (batch, height, width), error in written.errors.items():
        typer.echo(f"latents {batch}×{height}×{width}: differs from PyTorch by {error:.1e}")
    typer.echo(f"Written: {out}, with inputs {', '.join(written.inputs)}")
