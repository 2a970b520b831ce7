"""`convfusion demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.console import format_terms, hide_loading_bars, print_ending, print_results
from convfusion.cli.options import check_folder
from convfusion.progress import Progress

Results = Annotated[Path, typer.Option(help="Folder for demo.json, grid.png, report.html.")]
TrainingSteps = Annotated[int, typer.Option(help="Distillation steps.", min=1)]
TrainingSeed = Annotated[int, typer.Option(help="Seed of the distillation.")]


def demo(
    out: Results = Path("convfusion-demo"),
    steps: TrainingSteps = 400,
    seed: TrainingSeed = 0,
) -> None:
    """Remove the self-attention of a small model and train its replacement, in a few minutes."""
    from convfusion.demo import configure_distillation, run_demo

    check_folder(out)
    hide_loading_bars()
    with Progress(True) as progress:
        bar = progress.add("distilling", total=steps)

        def on_step(step: int, terms: dict[str, float]) -> None:
            shown = {name: value for name, value in terms.items() if name != "noise"}
            bar.update(step, name=f"distilling  {format_terms(shown)}")

        results = run_demo(
            out, configure_distillation(steps, seed), say=progress.say, on_step=on_step
        )
    print_results(results)
    print_ending(
        *(out / "grid.png", out / "report.html", out / "demo.json"),
        verdict=judge_demo(results),
        next_command=("convfusion", "generate", "mini", "--prompt", "red apple, noto"),
    )


def judge_demo(results: dict[str, Any]) -> str:
    """What the demo showed, in a sentence."""
    left = results["distilled"]["epsilon_error"] / results["removed"]["epsilon_error"]
    return (
        f"The distilled blocks leave {left:.0%} of the error that removing self-attention makes, "
        f"after {results['distilled']['steps']} steps of training."
    )
