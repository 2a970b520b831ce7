"""`convfusion analyze` and `convfusion ablate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion import text
from convfusion.cli.console import console, print_ending
from convfusion.cli.models import (
    check_loading,
    check_matplotlib,
    choose_guidance,
    is_embedded,
    open_stock_pipeline,
)
from convfusion.cli.options import (
    BatchSize,
    Device,
    Frames,
    Guidance,
    Model,
    OwnPromptFile,
    Precision,
    Revision,
    Size,
    Steps,
    check_new,
    parse_size,
)
from convfusion.errors import ConvFusionError
from convfusion.progress import Progress

if TYPE_CHECKING:
    from convfusion.analysis import Analysis, AnalysisConfig

Report = Annotated[Path, typer.Option(help="Folder for the report.")]
Timesteps = Annotated[
    str | None,
    typer.Option(help="Timesteps to look at, such as 881,481,81. Default: five of them."),
]
Queries = Annotated[int, typer.Option(help="Queries measured per attention map.")]
Memory = Annotated[int, typer.Option(help="MiB of memory for attention maps.")]
Cutoff = Annotated[
    float, typer.Option(help="Cut-off of the high-pass filter, in cycles per side of the grid.")
]
Order = Annotated[int, typer.Option(help="Order of that Butterworth filter.")]
Share = Annotated[
    float,
    typer.Option(help="Share of the attention that counts as the effective receptive field."),
]
Control = Annotated[
    bool, typer.Option("--control", help="Analyse an untrained model too, for comparison.")
]
Ablation = Annotated[Path, typer.Option(help="Folder for ablation.png and ablation.json.")]
Window = Annotated[
    list[int] | None, typer.Option(help="Size K of a K×K attention window. Repeat for more.")
]
Restricted = Annotated[
    list[str] | None,
    typer.Option(help="Restrict only these sites (self-attention layers), such as 'up_blocks.*'."),
]
MINI_PROMPTS = 15  # odd, so that both designs occur


def analyze(
    model: Model,
    out: Report,
    prompts: OwnPromptFile = None,
    steps: Steps = 25,
    timesteps: Timesteps = None,
    queries: Queries = 256,
    memory: Memory = 256,
    cutoff: Cutoff = 1.0,
    order: Order = 2,
    share: Share = 0.8,
    control: Control = False,
    size: Size = None,
    frames: Frames = None,
    guidance: Guidance = None,
    batch_size: BatchSize = 4,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Measure the self-attention of a pipeline, layer by layer, while it draws.

    Tells how local the attention of each layer is, and which kernel size would replace it. Writes
    report.html, analysis.json, figures, and kernels.json for `convert --config`.
    """
    check_matplotlib("take convfusion.analysis.analyze in Python for the numbers alone")
    check_loading(precision, device)
    from convfusion.analysis import AnalysisConfig, HighPass, Measure
    from convfusion.analysis.page import write_report
    from convfusion.analysis.verdict import check_claims, give_verdict

    check_new(out)
    config = AnalysisConfig(
        steps=steps,
        timesteps=parse_timesteps(timesteps),
        guidance=choose_guidance(model) if guidance is None else guidance,
        size=parse_size(size) if size else None,
        share=share,
        measure=Measure(HighPass(cutoff, order), queries, memory),
        batch_size=batch_size,
        frames=frames,
    )
    drawn = read_prompts(model, prompts)
    pipe = open_stock_pipeline(model, precision, device, revision)
    if guidance is None:
        config = replace(config, guidance=choose_guidance(model, pipe))
    analysis, other = run_analysis(pipe, drawn, config, control=control)
    write_report(analysis, out, other)
    print_claims(check_claims(analysis), check_claims(other) if other else None)
    kernels = out / "kernels.json"
    print_ending(
        *(out / "report.html", out / "analysis.json", kernels),
        verdict=give_verdict(analysis, other),
        next_command=("convfusion", "convert", model, "--config", kernels, "--out", "converted"),
    )


def run_analysis(
    pipe: Any, prompts: list[str], config: AnalysisConfig, *, control: bool
) -> tuple[Analysis, Analysis | None]:
    """The analysis of a pipeline and, as a control, of an untrained model, with progress bars."""
    from convfusion.analysis import analyze, build_untrained
    from convfusion.generate import swapped_denoiser

    steps = count_all_steps(pipe, len(prompts), config.steps, config.batch_size)
    with Progress(True) as progress:
        bar = progress.add("analysing", total=steps)
        with counted_steps(pipe, bar.advance):
            analysis = analyze(pipe, prompts, config)
        if not control:
            return analysis, None
        bar = progress.add("analysing an untrained model", total=steps)
        with swapped_denoiser(pipe, build_untrained(pipe)), counted_steps(pipe, bar.advance):
            return analysis, analyze(pipe, prompts, config)


@contextmanager
def counted_steps(pipe: Any, on_step: Callable[[], Any]) -> Iterator[None]:
    """Call a function after each step that a pipeline draws.

    Calls of the denoiser are no measure: some pipelines call it twice in a step, for guidance.
    """
    from convfusion.families.patches import wrapped_method

    def counting(step: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        on_step()
        return output

    with wrapped_method(pipe.scheduler, "step", counting):
        yield


def count_all_steps(pipe: Any, prompts: int, steps: int, batch_size: int) -> int:
    """How many steps it takes to draw every prompt once."""
    from convfusion.analysis.capture import count_steps

    return count_steps(pipe, steps) * math.ceil(prompts / batch_size)


def ablate(
    model: Model,
    out: Ablation,
    prompts: OwnPromptFile = None,
    window: Window = None,
    site: Restricted = None,
    steps: Steps = 25,
    timesteps: Timesteps = None,
    size: Size = None,
    guidance: Guidance = None,
    batch_size: BatchSize = 4,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw with attention restricted to windows, to the mean token, or removed. Nothing is trained.

    The ε-error is the relative squared error of the noise that the model predicts, against the
    unchanged model.
    """
    from convfusion.analysis import ablate as run
    from convfusion.analysis import list_variants, save_ablation

    check_new(out)
    check_loading(precision, device)
    drawn = read_prompts(model, prompts, mini_prompts=9)
    tried = list_variants(window or [13, 7, 3], sites=site)
    looked_at, wanted = parse_timesteps(timesteps), parse_size(size) if size else None
    pipe = open_stock_pipeline(model, precision, device, revision)
    total = count_all_steps(pipe, len(drawn), steps, batch_size) * (1 + len(tried))
    with Progress(True) as progress:
        bar = progress.add("drawing", total=total)
        rows = run(
            pipe,
            drawn,
            tried,
            steps=steps,
            timesteps=looked_at,
            guidance=choose_guidance(model, pipe) if guidance is None else guidance,
            size=wanted,
            batch_size=batch_size,
            on_call=bar.advance,
        )
    save_ablation(rows, drawn, out)
    print_ablation({name: row.to_dict() for name, row in rows.items()})
    print_ending(
        *(out / "ablation.png", out / "ablation.json"),
        next_command=("convfusion", "curve", model, "--out", "curve"),
    )


def read_prompts(model: str, path: Path | None, mini_prompts: int = MINI_PROMPTS) -> list[str]:
    """One prompt per line; blank lines do not count. The embedded model has its own."""
    if path is None:
        if not is_embedded(model):
            raise ConvFusionError("--prompts is needed: a text file with one prompt per line")
        from convfusion import mini
        from convfusion.demo import spread

        return spread(mini.training_data(), mini_prompts, offset=0.5).captions
    return text.read_prompts(path)


def parse_timesteps(text: str | None) -> tuple[float, ...] | None:
    """`881,481,81` → (881, 481, 81)."""
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ConvFusionError(f"timesteps look like 881,481,81, not {text!r}") from None


def print_claims(claims: list[tuple[str, str]], other: list[tuple[str, str]] | None) -> None:
    from rich.table import Table

    table = Table(title="The paper's claims, by layer")
    table.add_column("")
    table.add_column("this model")
    if other:
        table.add_column("untrained")
    for i, (claim, count) in enumerate(claims):
        table.add_row(claim, count, *([other[i][1]] if other else []))
    console().print(table)


def print_ablation(rows: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from convfusion.report import format_psnr

    table = Table(title="Without training, against the stock model")
    for column in ("", "ε-error", "picture PSNR"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in list(rows.items())[1:]:
        psnr = format_psnr(row["psnr"], row["psnr_error"])
        table.add_row(name, f"{row['epsilon_error']:.2e}", psnr)
    console().print(table)
