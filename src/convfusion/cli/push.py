"""`convfusion push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convfusion.cli.console import format_bytes, measure_size, print_ending

if TYPE_CHECKING:
    from convfusion.checkpoint.publish import Publication

Folder = Annotated[Path, typer.Argument(help="Blocks that `distill` or `convert` wrote.")]
Repository = Annotated[
    str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub, made if need be.")
]
License = Annotated[
    str | None,
    typer.Option(
        help="Short name of the licence of the blocks on the Hub, such as apache-2.0. Default: "
        "what the README.md of the folder says."
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Name on the Hub of the model that the blocks are for. Default: what the README.md or "
        "the manifest of the folder says."
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option(
        help="Folder that `evaluate` wrote for these blocks, for the figures in the card. Default: "
        "`evaluation` in the folder, if it is there."
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Branch = Annotated[str | None, typer.Option(help="Branch to write to. Default: the main one.")]
Message = Annotated[str, typer.Option(help="Message of the commit.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check all that needs no Hub, and show the card; send nothing."),
]


def push(
    folder: Folder,
    repo_id: Repository,
    license: License = None,
    base_model: BaseModel = None,
    evaluation: Evaluation = None,
    private: Private = False,
    revision: Branch = None,
    message: Message = "Blocks by ConvFusion",
    dry_run: DryRun = False,
) -> None:
    """Put blocks on the Hugging Face Hub, with a model card, so that they load by name.

    The blocks are trained, or computed from the attention. The folder is checked before anything
    is sent. A card is written if there is none, and the figures of an evaluation go into it. You
    must be logged in (`hf auth login`).
    """
    from convfusion.checkpoint.publish import prepare, upload
    from convfusion.progress import announced

    ready = prepare(folder, repo_id, license=license, base_model=base_model, evaluation=evaluation)
    if dry_run:
        show(ready)
        return
    with announced(f"Sending {len(ready.files) + 1} files …", True):
        address = upload(ready, private=private, revision=revision, message=message)
    name = repo_id if revision is None else f"{repo_id}@{revision}"
    words = ("convfusion", "generate", ready.base_model, "--blocks", name)
    print_ending(
        verdict=f'Sent: {address}\nIn Python: convfusion.load(pipe, "{name}")',
        next_command=(*words, "--prompt", "a lighthouse in a storm"),
    )


def show(ready: Publication) -> None:
    """The card and the files, as they would be sent."""
    typer.echo(ready.card)
    typer.echo(f"To {ready.repo_id} would go this card as README.md, and")
    for name, path in ready.files.items():
        typer.echo(f"  {name} ({format_bytes(measure_size(path))})")
