"""`convfusion curve`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.budget import MomentsFile, measure_and_save
from convfusion.cli.console import console, format_terms, print_ending
from convfusion.cli.distill import prepare_source
from convfusion.cli.models import (
    check_loading,
    check_matplotlib,
    equip,
    is_embedded,
    open_stock_pipeline,
)
from convfusion.cli.options import (
    Config,
    Data,
    Device,
    Frames,
    Model,
    Precision,
    Revision,
    Size,
    check_new,
)
from convfusion.progress import Bar, Progress

Curve = Annotated[Path, typer.Option(help="Folder for the curve and the configs.")]
TrainingSteps = Annotated[
    int, typer.Option(min=1, help="Training steps, in which each block learns alone.")
]
Samples = Annotated[int, typer.Option(min=1, help="Samples per step.")]
LearningRate = Annotated[float | None, typer.Option(help="Default: 5e-4, and 2e-2 for `mini`.")]
Warmup = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Steps over which the learning rate rises first. Default: 20, or all steps.",
    ),
]
Autocast = Annotated[str, typer.Option(help="Mixed precision in training: no, bf16 or fp16.")]
HeldOut = Annotated[
    int, typer.Option(min=1, help="Samples that are not trained on, to measure with.")
]
Counts = Annotated[
    list[int] | None,
    typer.Option(help="Write a config with this many sites. Repeat for more."),
]
Ranking = Annotated[str, typer.Option(help="What ranks the sites: epsilon or imitation.")]
MeasureMoments = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Draw quality against cost for --budget instead: measure moments on the pictures, "
        "and write them to OUT/moments.json or the file of --moments.",
    ),
]
TrainingSeed = Annotated[int, typer.Option(help="Seed of the training.")]
RATES = {True: 2e-2, False: 5e-4}  # the demo's on the embedded model; Grafting's for any other


def curve(
    model: Model,
    out: Curve,
    data: Data = None,
    config: Config = None,
    size: Size = None,
    frames: Frames = None,
    steps: TrainingSteps = 100,
    batch_size: Samples = 16,
    learning_rate: LearningRate = None,
    warmup: Warmup = None,
    autocast: Autocast = "no",
    held_out: HeldOut = 64,
    sites: Counts = None,
    by: Ranking = "epsilon",
    measure: MeasureMoments = False,
    moments: MomentsFile = None,
    seed: TrainingSeed = 0,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Find the sites (self-attention layers) that are cheapest to replace, and what each costs.

    The cost is the ε-error: the relative squared error of the noise that the model predicts.

    Writes curve.json, curve.csv, curve.png, and configs for `convert` and `distill`. With --measure
    or --moments, budget.csv and budget.png: the error within budgets of 1.5x to 12x, untrained.
    """
    check_matplotlib("take convfusion.distill.curve.replacement_curve in Python for the numbers")
    check_loading(precision, device)
    from convfusion.distill.curve import chosen_counts
    from convfusion.distill.partial import check_ranking
    from convfusion.distill.settings import RunSettings
    from convfusion.folders import locked

    check_new(out, may_hold="cache")  # of a run that was stopped, which goes on with it
    ranking = check_ranking(by)
    settings = {
        **choose_pace(model, steps, learning_rate, warmup),
        "batch_size": batch_size,
        "autocast": autocast,
        "seed": seed,
    }
    named: dict[str, Any] = {"model": model, "data": data or "", "size": size or ""}
    named |= {"frames": frames or 0, "distill": settings}
    run = RunSettings.from_dict(named)
    source = prepare_source(run)
    pipe = open_stock_pipeline(model, precision, device, revision)
    if measure or moments is not None:
        with locked(out):
            data_and_judge = split_data(pipe, run, source(pipe, out), held_out)
            draw_budget_curve(model, pipe, run, *data_and_judge, moments, out, measure)
        return
    counts = chosen_counts(equip(pipe, None, config).converted, sites)
    with locked(out):
        measured = measure_curve(pipe, run, *split_data(pipe, run, source(pipe, out), held_out))
        configs = measured.save(out, counts, ranking)
    print_curve(measured, ranking)
    print_written(model, out, configs)


def choose_pace(
    model: str, steps: int, learning_rate: float | None, warmup: int | None
) -> dict[str, Any]:
    """Settings of a training in which each block learns alone, at a rate that falls to 0."""
    return {
        "steps": steps,
        "imitation_steps": steps,
        "start": "attention",
        "learning_rate": RATES[is_embedded(model)] if learning_rate is None else learning_rate,
        "warmup": min(20, steps) if warmup is None else warmup,
        "decay": 1.0,
        "weight_decay": 0.0,
    }


def measure_curve(pipe: Any, run: Any, train: Any, apart: Any) -> Any:
    """The costs of all sites and the curve, with a bar for each part of the work."""
    from convfusion.distill.curve import replacement_curve
    from convfusion.distill.partial import site_costs

    with Progress(True) as progress:
        names = ("training each block alone", "replacing each site alone", "curve")
        training, alone, curve = (progress.add(name) for name in names)

        def on_step(step: int, terms: dict[str, float]) -> None:
            training.update(
                step,
                total=run.distill.steps,
                name=f"training each block alone  {format_terms(terms)}",
            )

        def advance(bar: Bar) -> Callable[[int, int], None]:
            return lambda done, total: bar.update(done, total=total)

        costs = site_costs(
            pipe, train, apart, run.distill, on_step=on_step, on_progress=advance(alone)
        )
        return replacement_curve(pipe, apart, costs, on_progress=advance(curve))


def draw_budget_curve(
    model: str,
    pipe: Any,
    run: Any,
    train: Any,
    apart: Any,
    file: Path | None,
    out: Path,
    fresh: bool,
) -> None:
    """Measure or read moments, then what each budget leaves; write it, and say what comes next."""
    from convfusion.budget import Moments
    from convfusion.distill.budget_curve import budget_curve
    from convfusion.distill.startup import draw_noised_batches

    def calls() -> Any:
        return draw_noised_batches(pipe, train, seed=run.distill.seed)

    place = file or out / "moments.json"
    found = measure_and_save(pipe, place, list(calls())) if fresh else Moments.load(place)
    with Progress(True) as progress:
        bar = progress.add("budgets")
        measured = budget_curve(
            pipe,
            apart,
            found,
            calls,
            batch_size=run.distill.batch_size,
            seed=run.distill.seed,
            on_progress=lambda done, total: bar.update(done, total=total),
        )
    files = measured.save(out)
    print_budgets(measured)
    command = ("convfusion", "convert", model, "--budget", "4x", "--moments", place)
    print_ending(*files, place, next_command=(*command, "--out", "converted"))


def print_budgets(measured: Any) -> None:
    """Predicted and measured errors of each budget."""
    from rich.table import Table

    table = Table(title=f"Error within budgets, untrained, {measured.samples} samples held out")
    for head in ("ranks", "budget", "fewer\noperations", "predicted", "measured"):
        table.add_column(head, justify="left" if head == "ranks" else "right")
    for point in measured.points:
        predicted = "" if point.predicted is None else f"{point.predicted:.2e}"
        name = "by moments" if point.choice == "moments" else "equal"
        saving = f"{point.saving:.2f}×"
        table.add_row(name, f"{point.budget:g}x", saving, predicted, f"{point.measured:.2e}")
    console().print(table)


def split_data(pipe: Any, run: Any, data: Any, count: int) -> tuple[Any, Any]:
    """What to train on and what to judge by; the embedded model has held-out names of its own."""
    from convfusion import mini
    from convfusion.data.latents import hold_out, prepare_data
    from convfusion.demo import spread

    if not run.data:
        own = mini.held_out_data("choice")  # sites are chosen on them
        return data, prepare_data(pipe, spread(own, min(count, len(own))))
    return hold_out(data, count, run.distill.seed)


def print_written(model: str, out: Path, configs: list[Path]) -> None:
    """The files, and the command that trains by the first of the configs, if there is one."""
    next_command: tuple[Any, ...] = ()
    if configs:
        next_command = ("convfusion", "distill", model, "--config", configs[0])
        next_command += ("--out", "convfusion-blocks")
    files = (out / "curve.png", out / "curve.json", out / "curve.csv", *configs)
    print_ending(*files, next_command=next_command)


def print_curve(measured: Any, ranking: str) -> None:
    """The sites in the chosen order, what other orders leave, and how two ways to rank agree."""
    from rich.table import Table

    from convfusion.families import shorten_path

    costs = {site.path: site for site in measured.costs.sites}
    table = Table(
        title=f"Sites that are cheapest to replace, {measured.costs.samples} samples held out"
    )
    names = {
        "by_epsilon": "least ε\nfirst",
        "by_imitation": "least imit.\nfirst",
        "dearest": "most imit.\nfirst",
    }
    own = f"by_{ranking}"
    others = [name for name in names if name != own]
    heads = ("", "site", "imit.\nerror", "ε-error\nalone", "FLOPs\ngone", "ε-error\nso far")
    for head in (*heads, *(names[name] for name in others)):
        table.add_column(head, justify="left" if head == "site" else "right")
    rows = zip(*(measured.orders[name] for name in (own, *others)), strict=True)
    for k, (point, *rivals) in enumerate(rows, 1):
        cost = costs[point.site]
        alone = [f"{error:.2e}" for error in (cost.imitation_error, cost.epsilon_error)]
        so_far = [f"{each.epsilon_error:.2e}" for each in (point, *rivals)]
        gone = f"{point.flops_gone:.0%}"
        table.add_row(str(k), shorten_path(point.site), *alone, gone, *so_far)
    console().print(table)
    agreement = measured.costs.rank_correlation
    if agreement is not None:
        typer.echo(f"Rank correlation of imitation error and ε-error alone: {agreement:.2f}")
