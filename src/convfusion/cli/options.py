"""What several commands take."""

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
        help="A diffusers pipeline: folder, Hub name or single .safetensors file; `mini` is the "
        "embedded model with its trained blocks, `mini-teacher` as it was trained."
    ),
]
Blocks = Annotated[
    Path | None,
    typer.Option(
        help="Trained blocks: a folder that `distill` or `save` wrote, or a .safetensors file "
        "that the paper's authors released."
    ),
]
Config = Annotated[
    str | None,
    typer.Option(help="Preset (sd15, sd21, sdxl, pixart, dit, default) or JSON file of a config."),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="Text file with one prompt per line.")
]
NegativePrompt = Annotated[
    str, typer.Option(help="What the pictures should not show.", show_default=False)
]
Every = Annotated[int | None, typer.Option(min=1, help="Convert only every N-th of the sites.")]
First = Annotated[int, typer.Option(min=0, help="With --every: the first of them, from 0.")]
Data = Annotated[
    str | None, typer.Option(help="What `convfusion cache` takes, or a cache it wrote.")
]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the pictures, in pixels.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for blocks, checkpoints, logs and model card.")
]
SettingsFile = Annotated[
    Path | None, typer.Option(help="TOML file of a run; what is given beside it goes first.")
]
Ratio = Annotated[
    list[float] | None,
    typer.Option(help="Channel ratio of the ΔConvBlocks; give it again. By default 0.5."),
]
Rivals = Annotated[
    str | None, typer.Option("--mixers", help="Rivals, with commas between: delta_conv,linfusion,…")
]
Batch = Annotated[
    int,
    typer.Option("--batch", min=1, help="Two are a picture under classifier-free guidance."),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model that is a Hub name.")
]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, …; by default the GPU if there is one.")
]


def check_new(out: Path, *, advice: str = "choose another folder", may_hold: str = "") -> None:
    """Refuse to write into a folder that holds something else than what it may."""
    from convfusion.folders import is_unfinished

    check_folder(out)
    held = [each for each in out.iterdir() if not is_unfinished(each)] if out.exists() else []
    if any(each.name not in (may_hold, LOCK) for each in held):
        raise ConvFusionError(f"{out} exists and is not empty: {advice}")


def check_folder(path: Path) -> None:
    """Refuse a folder where a file lies or nothing can be written, before any work is done."""
    place = Path(os.path.realpath(path))
    nearest = next(each for each in (place, *place.parents) if each.exists())
    if not nearest.is_dir():
        raise ConvFusionError(f"{path} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConvFusionError(f"{path} cannot be written: nothing may be written in {nearest}")


def check_file(path: Path | None) -> None:
    """Refuse to write a file where none can be, before any work is done for it."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise ConvFusionError(f"{path} cannot be a file: name one in a folder that is there")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConvFusionError(f"{path} cannot be written: nothing may be written in {path.parent}")


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` → (height, width)."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConvFusionError(f"a size looks like 512x768 (width x height), not {text!r}")
    return int(height), int(width)
