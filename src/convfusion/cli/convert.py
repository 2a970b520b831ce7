"""`convfusion convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.console import print_ending
from convfusion.cli.models import check_loading, equip, open_pipeline, warn_of
from convfusion.cli.options import (
    Blocks,
    Config,
    Every,
    First,
    Model,
    Precision,
    Revision,
    check_new,
)

Converted = Annotated[Path, typer.Option(help="New folder for the converted pipeline or blocks.")]
DropAttention = Annotated[
    bool,
    typer.Option(
        "--drop-attention",
        help="Leave out the weights of the replaced attention. Training is not possible then.",
    ),
]
BlocksOnly = Annotated[
    bool, typer.Option("--blocks-only", help="Write the blocks alone, without the model.")
]
Average = Annotated[
    bool,
    typer.Option(
        help="Of a released file that holds both, take the moving average of the weights."
    ),
]


def convert(
    model: Model,
    out: Converted,
    config: Config = None,
    blocks: Blocks = None,
    every: Every = None,
    first: First = 0,
    drop_attention: DropAttention = False,
    blocks_only: BlocksOnly = False,
    average: Average = True,
    revision: Revision = None,
    precision: Precision = "float32",
) -> None:
    """Replace self-attention by ΔConvBlocks and write the pipeline to a folder.

    Without --blocks they are untrained: train them with `convfusion distill`. With a file of
    released weights as --blocks, they are written in ConvFusion's own format.
    """
    from convfusion import checkpoint, surgery
    from convfusion.checkpoint import pipelines

    check_new(out)
    check_loading(precision, None)
    pipe = open_pipeline(model, precision, "cpu", revision)
    status = equip(pipe, blocks, config, every, first, average)
    if drop_attention:
        status = surgery.drop_attention(pipe)
    if blocks_only:
        checkpoint.save(pipe, out)
    else:
        pipelines.save_pipeline(pipe, out)
    typer.echo(str(status))
    warning = warn_of(status.record)
    next_command = ["convfusion", "generate", out, "--prompt", "a red apple"]
    if warning and blocks_only:
        next_command = []
    elif warning and not drop_attention:
        next_command = ["convfusion", "distill", out, "--data", "DATA"]
        next_command += ["--out", "convfusion-blocks"]
    elif blocks_only:
        next_command = ["convfusion", "generate", model, "--blocks", out, "--prompt", "a red apple"]
    print_ending(out, verdict=warning, next_command=next_command)
