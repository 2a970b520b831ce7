"""`convfusion demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convfusion.cli.console import format_terms, hide_loading_bars, print_ending, print_results
from convfusion.cli.options import check_folder
from convfusion.progress import Progress

Results = Annotated[Path, typer.Option(help="Folder for demo.json, grid.png, report.html.")]
TrainingSteps = Annotated[int, typer.Option(help="Distillation steps.", min=1)]
TrainingSeed = Annotated[int, typer.Option(help="Seed of the distillation.")]


def demo(
    out: Results = Path("convfusion-demo"),
    steps: TrainingSteps = 100,
    seed: TrainingSeed = 0,
) -> None:
    """Replace the self-attention of a small model in several ways, and compare, in some minutes.

    It is removed; computed halo blocks take its place, which are then distilled; and the two
    students that come with ConvFusion draw as well.
    """
    from convfusion.demo import DEMO_RATE, PICTURES, configure_distillation, run_demo, tell_shares

    check_folder(out)
    hide_loading_bars()
    with Progress(True) as progress:
        drawing = progress.add("drawing", total=PICTURES)
        bar = progress.add("distilling", total=steps)

        def on_step(step: int, terms: dict[str, float]) -> None:
            shown = {name: value for name, value in terms.items() if name != "noise"}
            bar.update(step, name=f"distilling  {format_terms(shown)}")

        results = run_demo(
            out,
            configure_distillation(steps, seed, learning_rate=DEMO_RATE),
            say=progress.say,
            on_step=on_step,
            on_drawn=drawing.advance,
        )
    print_results(results)
    print_ending(
        *(out / "grid.png", out / "report.html", out / "demo.json"),
        verdict=tell_shares(results),
        next_command=("convfusion", "generate", "mini", "--prompt", "red apple, noto"),
    )
