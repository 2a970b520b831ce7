"""`convfusion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.console import print_ending
from convfusion.cli.models import check_blocks, choose_guidance, equip, open_pipeline
from convfusion.cli.options import Blocks, Model
from convfusion.errors import ConvFusionError
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
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="With --pipeline: put the weights of the denoiser's matrix products in 8 bits.",
    ),
]


def export(
    model: Model,
    out: Target,
    pipeline: Whole = False,
    int8: Int8 = False,
    blocks: Blocks = None,
) -> None:
    """Write a converted denoiser as ONNX, for pictures of any size, and compare it with PyTorch.

    With --pipeline, write everything that drawing needs.
    """
    from convfusion.export import check_folder, check_target, export_onnx, export_pipeline

    if int8 and not pipeline:
        raise ConvFusionError("--int8 goes with --pipeline")
    (check_folder if pipeline else check_target)(out)
    check_blocks(blocks)
    pipe = open_pipeline(model, "float32", "cpu")
    if blocks is not None:
        equip(pipe, blocks, None)
    said = "Tracing, writing and comparing with PyTorch"
    if pipeline:
        whole = export_pipeline(
            pipe,
            out,
            guidance=choose_guidance(model, pipe),
            int8=int8,
            on_part=lambda part: typer.echo(f"{said}: {part} …", err=True),
        )
        for part, error in whole.errors.items():
            typer.echo(f"{part}: differs from PyTorch by {error:.1e}")
        if whole.int8_error is not None:
            typer.echo(f"int8: predictions differ from float32 by {whole.int8_error:.1e} (squared)")
        print_ending(out, verdict="examples/onnx_generate.py draws with this folder.")
        return
    with announced(f"{said} …", True):
        written = export_onnx(pipe, out)
    for (batch, height, width), error in written.errors.items():
        typer.echo(f"latents {batch}×{height}×{width}: differs from PyTorch by {error:.1e}")
    print_ending(out, verdict=f"Inputs: {', '.join(written.inputs)}.")
