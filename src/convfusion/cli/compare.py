"""`convfusion compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.clips import Frames, choose_frames
from convfusion.cli.console import console, print_ending
from convfusion.cli.generate import gather_prompts
from convfusion.cli.models import (
    check_blocks,
    check_loading,
    choose_guidance,
    is_embedded,
    open_pipeline,
)
from convfusion.cli.options import (
    BLOCKS_HELP,
    BatchSize,
    Device,
    Guidance,
    Model,
    NegativePrompt,
    Precision,
    Prompt,
    PromptFile,
    Revision,
    Size,
    Steps,
    check_file,
    parse_size,
)
from convfusion.errors import ConvFusionError
from convfusion.text import check_prompts

if TYPE_CHECKING:
    from convfusion.evaluate.comparison import Comparison

Rows = Annotated[
    list[str] | None, typer.Option(help=f"{BLOCKS_HELP} Repeat the option for more rows.")
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="Every prompt is drawn from this seed. Repeat for more. Default: 0."),
]
Grid = Annotated[Path, typer.Option(help="PNG file for the grid.")]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many of the prompts, at even distances in their list. Default: all, and 5 of "
        "those that `mini` has.",
    ),
]
Columns = Annotated[int, typer.Option(min=1, help="Pictures side by side; more go on below.")]
WithoutAttention = Annotated[
    bool, typer.Option("--removed", help="Add a row without self-attention, and nothing instead.")
]
MINI_PROMPTS = 5


def compare(
    model: Model,
    blocks: Rows = None,
    removed: WithoutAttention = False,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    samples: Samples = None,
    negative_prompt: NegativePrompt = "",
    seed: Seeds = None,
    out: Grid = Path("comparison.png"),
    columns: Columns = 5,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    batch_size: BatchSize = 4,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw one grid: the teacher (the model with its attention), then every set of blocks.

    All rows share prompts and seeds, so that pictures in a column can be compared. PSNR, in
    decibels, tells how close each row is to the teacher's; higher is closer. `mini` compares its
    own trained blocks, and has prompts of its own. Clips are shown as strips of their frames.
    """
    from convfusion.evaluate.comparison import compare_blocks
    from convfusion.families.calls import check_call
    from convfusion.generate import check_numbers, check_size

    texts, seeds = choose_prompts(model, prompt, prompts, samples), seed or [0]
    check_prompts([negative_prompt])
    check_grid(out)
    check_loading(precision, device)
    check_numbers(seeds, steps, 0 if guidance is None else guidance, batch_size)
    students = name_rows(blocks or [])
    wanted = parse_size(size) if size else None
    options = {"negative_prompt": negative_prompt} if negative_prompt else {}
    pipe = open_pipeline(model, precision, device, revision)
    count = choose_frames(pipe, frames)
    check_call(pipe, texts, wanted, options, clips=count is not None)
    if wanted:
        check_size(pipe, wanted)
    check_rows(model, pipe, students)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance": choose_guidance(model, pipe) if guidance is None else guidance,
        "size": wanted,
        "batch_size": batch_size,
        **options,
    }
    settings |= {"removed": removed, "frames": count, "progress": True}
    compared = compare_blocks(pipe, students, texts, seeds, **settings)
    noun, columns = ("pictures", columns) if count is None else ("clips", 1)  # strips are wide
    compared.grid(columns).save(out)
    print_comparison(compared, noun)
    print_ending(out, next_command=name_evaluation(model, blocks, frames))


def name_evaluation(model: str, blocks: list[str] | None, frames: int | None) -> tuple[str, ...]:
    """The command that measures what was compared."""
    command = ["convfusion", "evaluate", model]
    command += ["--blocks", blocks[0]] if blocks else []
    command += ["--frames", str(frames)] if frames else []
    return (*command, "--out", "convfusion-evaluation")


def choose_prompts(
    model: str, prompts: list[str] | None, file: Path | None, samples: int | None
) -> list[str]:
    """The prompts that are named; without any, some that the embedded model was not trained on.

    Args:
        model: whose prompts they are.
        prompts, file: as on the command line.
        samples: how many of them.
    """
    from convfusion import mini
    from convfusion.evaluate.settings import spread_evenly

    if not prompts and file is None and is_embedded(model):
        texts, samples = mini.held_out_data("results").captions, samples or MINI_PROMPTS
    else:
        texts = gather_prompts(prompts, file)
    if samples is not None and samples > len(texts):
        raise ConvFusionError(f"--samples asks for {samples} of {len(texts)} prompts")
    return texts if samples is None else spread_evenly(texts, samples)


def check_grid(out: Path) -> None:
    """Refuse a name that the grid cannot be written to, before any work."""
    if out.suffix.lower() != ".png":
        raise ConvFusionError(f"the grid is a PNG file: {out} must end in .png")
    check_file(out)


def name_rows(blocks: list[str]) -> dict[str, str]:
    """Trained blocks by the name of their row: that of their folder, or as much as tells apart.

    Raises:
        ConvFusionError: one of them is nowhere, or given twice.
    """
    check_blocks(*blocks)
    places = [Path(each).resolve() if Path(each).exists() else each for each in blocks]
    if len(set(places)) < len(blocks):
        raise ConvFusionError("the same blocks are given twice with --blocks")
    names = [Path(each).name if Path(each).exists() else each for each in blocks]
    return {
        each if names.count(name) > 1 or not name else name: each
        for name, each in zip(names, blocks, strict=True)
    }


def check_rows(model: str, pipe: Any, students: dict[str, str]) -> None:
    """Raise a ConvFusionError where the teacher's row would be the only one."""
    from convfusion.surgery import mixers_of

    if not students and not mixers_of(pipe):
        raise ConvFusionError(
            f"{model} has no trained blocks to compare: add --blocks with a folder that `distill` "
            "wrote"
        )


def print_comparison(compared: Comparison, noun: str) -> None:
    """The PSNR of each student's row to the teacher's."""
    from rich.table import Table

    from convfusion.report import format_psnr

    count = len(compared.captions)
    told = f"1 {noun.rstrip('s')}" if count == 1 else f"{count} {noun} each"
    table = Table(title=f"Closeness to the teacher's {noun}, {told}")
    table.add_column("blocks")
    table.add_column("PSNR, higher is closer", justify="right")
    for name, psnr in compared.psnr.items():
        table.add_row(name, format_psnr(*psnr))
    console().print(table)
