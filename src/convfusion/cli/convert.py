"""`convfusion convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.budget import (
    Keep,
    MomentsFile,
    Within,
    check_budget,
    choose_conversion_within,
    latents_of,
    print_expected,
)
from convfusion.cli.console import console, print_ending
from convfusion.cli.models import (
    check_blocks,
    check_loading,
    check_together,
    choose_guidance,
    equip,
    open_pipeline,
    open_stock_pipeline,
    warn_of,
)
from convfusion.cli.options import (
    Blocks,
    Config,
    Device,
    Every,
    First,
    Frames,
    Model,
    Precision,
    Revision,
    Size,
    check_new,
    parse_size,
)
from convfusion.errors import ConvFusionError
from convfusion.text import read_prompts

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
Mixer = Annotated[
    str | None,
    typer.Option(
        help="What replaces every self-attention: delta_conv, halo, … Default: what the preset has."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--measure",
        help="Text file with one prompt per line, eight or so. They are drawn with the attention, "
        "and the blocks are set by what it does: no training, no data.",
    ),
]
Average = Annotated[
    bool,
    typer.Option(
        help="Of a released file that holds both, take the moving average of the weights."
    ),
]


def check_use_of_frames(
    frames: int | None, measured: bool, budget: str | None, size: str | None
) -> None:
    """Raise a ConvFusionError for frames that nothing would be drawn or chosen for."""
    if frames is not None and not measured and (budget is None or size is None):
        raise ConvFusionError("--frames goes with --measure, or with --budget and --size")


def convert(
    model: Model,
    out: Converted,
    config: Config = None,
    mixer: Mixer = None,
    budget: Within = None,
    measure: Prompts = None,
    moments: MomentsFile = None,
    keep: Keep = 0,
    size: Size = None,
    frames: Frames = None,
    blocks: Blocks = None,
    every: Every = None,
    first: First = 0,
    drop_attention: DropAttention = False,
    blocks_only: BlocksOnly = False,
    average: Average = True,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Replace self-attention by ΔConvBlocks or other mixers, and write the pipeline to a folder.

    Without --blocks and --measure they are untrained: train them with `convfusion distill`. With
    --measure they start from the attention, which is enough for halo blocks to draw as before, and
    brings ΔConvBlocks nearer. With a file of released weights as --blocks, they are written in
    ConvFusion's own format.

    With --budget, what stands at each site is chosen so that the error is least; --size is the one
    that it is chosen for. A model that draws videos takes --frames beside --size.
    """
    from convfusion import save, save_pipeline, surgery
    from convfusion.families import check_alone

    check_new(out)
    check_loading(precision, device)
    check_together(blocks, config, every, first, mixer)
    check_blocks(blocks)
    prompts = read_prompts(measure) if measure is not None else []
    check_budget(budget, moments, keep, measured=bool(prompts))
    check_choice(bool(prompts), budget, size, blocks, (config, mixer, every))
    check_use_of_frames(frames, bool(prompts), budget, size)
    opened = open_stock_pipeline if prompts or budget is not None else open_pipeline
    pipe = opened(model, precision, device if prompts else device or "cpu", revision)
    if not blocks_only:
        check_alone(pipe, "whole saved pipelines (without --blocks-only)")
    wanted = None if size is None else parse_size(size)
    latents = None if wanted is None else latents_of(pipe, wanted, frames)
    calls = draw_calls(model, pipe, prompts, wanted, frames) if prompts else []
    chosen, found = choose_conversion_within(pipe, budget, moments, keep, latents, calls)
    if chosen is not None:
        surgery.convert(pipe, chosen.config())
    else:
        equip(pipe, blocks, config, every, first, average, mixer)
    if prompts:
        errors = surgery.start_from_attention(pipe, calls)
        print_errors(errors)
        print_expected(chosen, found, errors)
    status = (surgery.drop_attention if drop_attention else surgery.status)(pipe)
    (save if blocks_only else save_pipeline)(pipe, out)
    typer.echo(str(status))
    warning = warn_of(status.record)
    trainable = bool(warning) and not (prompts or drop_attention)
    drawn = [] if frames is None else ["--frames", frames, *(["--size", size] if size else [])]
    words = list_next_words(model, out, blocks_only, trainable) + ([] if trainable else drawn)
    print_ending(out, verdict=warning, next_command=words)


def check_choice(
    measured: bool,
    budget: str | None,
    size: str | None,
    blocks: str | None,
    others: tuple[Any, ...],
) -> None:
    """Raise a ConvFusionError for ways to choose a conversion that do not go together.

    Args:
        measured: whether prompts are drawn to start from.
        budget, size, blocks: the options.
        others: further options that choose a conversion.
    """
    if measured and blocks is not None:
        raise ConvFusionError("trained blocks need no start: give --blocks or --measure")
    if budget is not None and any(each is not None for each in (blocks, *others)):
        raise ConvFusionError(
            "a budget chooses the conversion: leave --config, --mixer, --blocks and --every out"
        )
    if size is not None and budget is None and not measured:
        raise ConvFusionError("--size goes with --budget or --measure")
    if size is not None:
        parse_size(size)


def list_next_words(model: str, out: Path, blocks_only: bool, trainable: bool) -> list[Any]:
    """The command to type next: training for blocks that want it, else drawing.

    Args:
        model: the base.
        out: where the pipeline or the blocks were written.
        blocks_only: whether it is blocks alone.
        trainable: whether they are to be trained first.
    """
    if trainable:
        words = ["convfusion", "distill", out, "--data", "DATA", "--out", "convfusion-blocks"]
        return [] if blocks_only else words
    words = ["convfusion", "generate", *([model, "--blocks", out] if blocks_only else [out])]
    return [*words, "--prompt", "a red apple"]


def draw_calls(
    model: str, pipe: Any, prompts: list[str], size: tuple[int, int] | None, frames: int | None
) -> list[dict[str, Any]]:
    """Calls of the denoiser from drawing prompts with its attention."""
    from convfusion.recording import record_calls

    guidance = choose_guidance(model, pipe)
    return record_calls(pipe, prompts, guidance=guidance, size=size, frames=frames, progress=True)


def print_errors(errors: dict[str, float]) -> None:
    """How near each mixer starts to its attention; those that nothing is measured for have none."""
    from rich.table import Table

    from convfusion.families import shorten_path

    if not errors:
        typer.echo("There was nothing to measure: these blocks are as near as they start.")
        return
    table = Table()
    table.add_column("site")
    table.add_column("expected error\nof its output", justify="right")
    for path, error in errors.items():
        table.add_row(shorten_path(path), f"{error:.2e}")
    console().print(table)
    typer.echo("Errors are squared, and relative to the variance of the attention's output.")
