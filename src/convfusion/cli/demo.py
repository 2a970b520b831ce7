"""`convfusion demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.console import describe, hide_loading_bars, print_results, progress_bar
from convfusion.cli.options import check_folder


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json, grid.png, report.html.")] = Path(
        "out"
    ),
    steps: Annotated[int, typer.Option(help="Distillation steps.", min=1)] = 400,
    seed: Annotated[int, typer.Option(help="Of the distillation.")] = 0,
) -> None:
    """Take the embedded model's self-attention away and distil its replacement, live."""
    from convfusion.demo import distillation, run_demo

    check_folder(out)
    hide_loading_bars()
    progress = progress_bar()
    bar = progress.add_task("distilling", total=steps, visible=False)

    def on_step(step: int, terms: dict[str, float]) -> None:
        shown = {name: value for name, value in terms.items() if name != "noise"}
        progress.update(bar, completed=step, visible=True, description=describe(shown))

    with progress:
        results = run_demo(
            out, distillation(steps, seed), say=progress.console.print, on_step=on_step
        )
    print_results(results)
    typer.echo(f"Written: {out}/demo.json, {out}/grid.png, {out}/report.html")
