"""`convfusion evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.analyze import read_prompts
from convfusion.cli.clips import Frames, choose_frames
from convfusion.cli.console import INTERRUPTED, console, fail, print_ending
from convfusion.cli.models import (
    check_blocks,
    check_loading,
    choose_guidance,
    equip,
    is_embedded,
    name_pipeline,
    open_pipeline,
)
from convfusion.cli.options import (
    BatchSize,
    Blocks,
    Device,
    Guidance,
    Model,
    OwnPromptFile,
    Precision,
    Size,
    Steps,
    check_folder,
    parse_size,
)

MINI_SAMPLES = 64

Continued = Annotated[
    Path, typer.Option(help="Folder for pictures and report. An unfinished one is continued.")
]
Teacher = Annotated[
    str | None,
    typer.Option(help="Pipeline to compare with. Default: the model's own attention."),
]
Samples = Annotated[
    int | None,
    typer.Option(min=2, help="Number of pictures. Default: one per prompt, and 64 for `mini`."),
]
FirstSeed = Annotated[
    int, typer.Option(min=0, help="Seed of the first picture; the following count up from it.")
]
Real = Annotated[
    str | None,
    typer.Option(
        help="Real pictures: a folder, or any data that `convfusion cache` takes. Of a model that "
        "draws videos, a folder of clips."
    ),
]
Network = Annotated[
    str,
    typer.Option(
        help="Network whose features are compared: efficientnet-lite0, or the folder or Hub name "
        "of another, such as DINOv2."
    ),
]
ClipModel = Annotated[
    str | None, typer.Option(help="Folder or Hub name of a CLIP model, for the CLIP score.")
]


def evaluate(
    model: Model,
    out: Continued,
    blocks: Blocks = None,
    teacher: Teacher = None,
    prompts: OwnPromptFile = None,
    samples: Samples = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    seed: FirstSeed = 0,
    size: Size = None,
    frames: Frames = None,
    real: Real = None,
    extractor: Network = "efficientnet-lite0",
    clip: ClipModel = None,
    batch_size: BatchSize = 8,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw with student and teacher from equal seeds, and measure whether they are equally good.

    Writes report.html, evaluation.json, evaluation.csv, samples.csv and the pictures, or the clips
    of a model that draws videos. Under a launcher such as torchrun, processes share the drawing.
    """
    from convfusion.evaluate import open_clip, open_extractor, plan_evaluation
    from convfusion.imports import check_installed

    check_installed("torchmetrics", "matplotlib", extra="eval")
    check_networks(extractor, clip)
    check_folder(out)
    check_loading(precision, device)
    check_blocks(blocks)
    check_real(real)
    wanted = choose_prompts(model, prompts)
    if samples is None and prompts is None:
        samples = MINI_SAMPLES
    settings = plan_evaluation(
        wanted,
        samples,
        seed,
        steps=steps,
        guidance=choose_guidance(model) if guidance is None else guidance,
        size=parse_size(size) if size else None,
        batch_size=batch_size,
    )
    pipe, other = open_pipelines(model, blocks, teacher, precision, device)
    scale = choose_guidance(model, pipe) if guidance is None else guidance
    settings = replace(settings, guidance=scale, frames=choose_frames(pipe, frames))
    evaluation = run(
        pipe,
        settings,
        out,
        extractor=open_extractor(extractor, pipe.device),
        teacher=other,
        real=open_real_pictures(pipe, model, real, prompts, settings),
        clip=open_clip(clip, pipe.device) if clip else None,
        names=name_sides(model, blocks, teacher),
    )
    if evaluation is not None:
        print_outcome(evaluation, out)


def run(pipe: Any, settings: Any, out: Path, **options: Any) -> Any:
    """Evaluate with a progress bar, in the first of several processes."""
    from convfusion.evaluate import evaluate
    from convfusion.evaluate.drawing import read_rank
    from convfusion.progress import Progress

    progress = Progress(read_rank()[0] == 0)
    bar = progress.add("drawing", total=len(settings))

    def on_progress(stage: str, done: int) -> None:
        bar.update(done, name=stage)

    try:
        with progress:
            return evaluate(pipe, settings, out, on_progress=on_progress, **options)
    except KeyboardInterrupt:
        fail("stopped: the same command continues from here", INTERRUPTED)


def choose_prompts(model: str, file: Path | None) -> list[str]:
    """The prompts of a file; of the embedded model, its list for results."""
    from convfusion import mini

    if file is None and is_embedded(model):
        return list(mini.held_out_data("results").captions)
    return read_prompts(model, file)


def open_pipelines(
    model: str, blocks: str | None, teacher: str | None, precision: str, device: str | None
) -> tuple[Any, Any]:
    """The student, and its teacher if that is another pipeline."""
    pipe = open_pipeline(model, precision, device)
    if blocks is not None:
        equip(pipe, blocks, None)
    return pipe, open_pipeline(teacher, precision, device) if teacher else None


def name_sides(model: str, blocks: str | None, teacher: str | None) -> tuple[str, str]:
    """What the report calls the student and its teacher."""
    return (
        name_pipeline(model, blocks),
        name_pipeline(teacher) if teacher else "its own attention",
    )


def open_real_pictures(
    pipe: Any, model: str, spec: str | None, prompts: Path | None, settings: Any
) -> Any:
    """Real pictures or clips to compare with; the embedded model has some for its own prompts."""
    from convfusion import mini
    from convfusion.evaluate.drawing import read_rank
    from convfusion.evaluate.real import decoded, open_real, open_real_clips
    from convfusion.evaluate.settings import size_of
    from convfusion.families import latent_scale

    size = size_of(pipe, settings)
    if spec is not None and settings.frames is not None:
        return open_real_clips(spec, settings.frames, size)
    if spec is not None:
        return open_real(spec, size)
    if not is_embedded(model) or prompts is not None:
        return None
    held, scale = mini.held_out_data("results"), latent_scale(pipe)
    height, width = (side * scale for side in held.latents.shape[-2:])
    if size[0] > height or size[1] > width:
        if read_rank()[0] == 0:
            typer.echo(
                f"Without distances to real pictures: those at hand are {width}×{height}, smaller "
                f"than {size[1]}×{size[0]}."
            )
        return None
    return decoded(pipe, held, "held-out pictures, as the VAE decodes them", size)


def check_networks(*names: str | None) -> None:
    """Raise a ConvFusionError for a network that is named and is not there."""
    from convfusion.evaluate.extractors import check_extractor

    for name in names:
        if name is not None:
            check_extractor(name)


def check_real(spec: str | None) -> None:
    """Raise a ConvFusionError unless there are real pictures or clips where they should be."""
    from convfusion.data.clips import has_clips
    from convfusion.evaluate.real import open_real

    if spec is not None and not has_clips(spec):
        open_real(spec, (1, 1))


def print_outcome(evaluation: Any, out: Path) -> None:
    """The numbers, what was written, and the verdict."""
    from convfusion.evaluate.verdict import give_verdict

    print_evaluation(evaluation)
    names = ["report.html", "evaluation.json", "evaluation.csv", "samples.csv"]
    names += ["frames.csv"] if evaluation.motion else []
    print_ending(*(out / name for name in names), verdict=give_verdict(evaluation))


def print_evaluation(evaluation: Any) -> None:
    """Each number of the student beside the teacher's own, from equal noises and from others."""
    from rich.table import Table
    from rich.text import Text

    from convfusion.evaluate.drawing import OTHER, STUDENT, TEACHER
    from convfusion.evaluate.page import name_set
    from convfusion.evaluate.results import list_metrics

    groups: dict[str, dict[str, dict[str, str]]] = {}
    for row in list_metrics(evaluation):
        error = row["standard_error"]
        cell = f"{row['value']:.3g}" + ("" if error is None else f" ± {error:.1g}")
        rows = groups.setdefault(row["reference"], {}).setdefault(row["metric"], {})
        rows[row["pictures"]] = cell
    title = f"{evaluation.student} and its teacher, {len(evaluation.samples)} samples"
    table = Table(title=f"{title}, features of {evaluation.extractor['name']}")
    table.add_column("")
    sides = (STUDENT, TEACHER, OTHER)
    for side in sides:
        words = name_set(side, evaluation.noun)
        table.add_column(words.replace(", ", ",\n"), justify="right")
    for reference, metric_rows in groups.items():
        words = name_set(reference, evaluation.noun)
        against = f"against {words}" if reference else "by itself"
        table.add_section()
        table.add_row(Text(against, style="bold"))
        for metric, cells in metric_rows.items():
            table.add_row(metric.replace("_", " "), *(cells.get(side, "") for side in sides))
    console().print(table)
