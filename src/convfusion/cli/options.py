"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from convfusion.errors import ConvFusionError
from convfusion.folders import LOCK

Model = Annotated[
    str,
    typer.Argument(
        help="A diffusers pipeline: a folder, a name on the Hub or a single .safetensors file. "
        "`mini` is the small model that comes with ConvFusion, with trained halo blocks; "
        "`mini-delta` has ΔConvBlocks instead, and `mini-teacher` its own attention."
    ),
]
BLOCKS_HELP = (
    "Trained blocks: a folder that `distill` wrote, a .safetensors file that the paper's authors "
    "released, `mini` or `mini-delta` for those in the package, or USER/NAME or USER/NAME@REVISION "
    "on the Hub."
)
Blocks = Annotated[str | None, typer.Option(help=BLOCKS_HELP)]
Config = Annotated[
    str | None,
    typer.Option(
        help="How to convert: a preset (sd15, sd21, sdxl, pixart, dit, sd3, flux, …, default, "
        "halo) or a JSON file. Default: the preset that fits the model."
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="Text file with one prompt per line.")
]
OwnPromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="Text file with one prompt per line. `mini` has prompts of its own."
    ),
]
Prompt = Annotated[
    list[str] | None, typer.Option(help="What to draw. Repeat the option for more pictures.")
]
NegativePrompt = Annotated[
    str, typer.Option(help="What the pictures should not show.", show_default=False)
]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale. Default: 5, and 3 for `mini`.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")]
Every = Annotated[
    int | None, typer.Option(min=1, help="Convert only every N-th site (self-attention layer).")
]
First = Annotated[
    int, typer.Option(min=0, help="With --every: which site is the first, counted from 0.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Training data: pictures with captions or prompts, as for `convfusion cache`, or a "
        "cache."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(help="WIDTHxHEIGHT of the pictures in pixels. Default: the model's own."),
]
Frames = Annotated[
    int | None,
    typer.Option(min=1, help="Frames of each clip, for a model of videos. Default: its own."),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for blocks, checkpoints, logs and model card.")
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(help="TOML file with settings; options on the command line override it."),
]
Ratio = Annotated[
    list[float] | None,
    typer.Option(help="Channel ratio of the ΔConvBlocks. Repeat for more. Default: 0.5."),
]
Rivals = Annotated[
    str | None,
    typer.Option(
        "--mixers", help="Token mixers to compare, separated by commas: delta_conv,linfusion,…"
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch", min=1, help="Batch size; 2 is one picture under classifier-free guidance."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Default: the GPU if there is one.")]


def check_new(out: Path, *, advice: str = "choose another folder", may_hold: str = "") -> None:
    """Refuse to write into a folder that already holds something else."""
    from convfusion.folders import is_unfinished

    check_folder(out)
    entries = [path for path in out.iterdir() if not is_unfinished(path)] if out.exists() else []
    if any(path.name not in (may_hold, LOCK) for path in entries):
        raise ConvFusionError(f"{out} exists and is not empty: {advice}")


def check_folder(path: Path) -> None:
    """Refuse a folder where a file lies or nothing can be written, before any work is done."""
    place = Path(os.path.realpath(path))
    nearest = next(parent for parent in (place, *place.parents) if parent.exists())
    if not nearest.is_dir():
        raise ConvFusionError(f"{path} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConvFusionError(f"{path} cannot be written: you have no right to write in {nearest}")


def check_file(path: Path | None) -> None:
    """Refuse to write a file where none can be, before any work is done for it."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise ConvFusionError(f"{path} cannot be a file: name one in a folder that exists")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConvFusionError(
            f"{path} cannot be written: you have no right to write in {path.parent}"
        )


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` → (height, width)."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConvFusionError(f"a size looks like 512x768 (width x height), not {text!r}")
    return int(height), int(width)
