"""`convfusion generate`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.console import progress_bar
from convfusion.cli.models import check_loading, guidance_for, load_pipeline, strength_for
from convfusion.cli.options import (
    Blocks,
    Device,
    Model,
    Precision,
    Revision,
    Size,
    check_file,
    check_folder,
    parse_size,
)
from convfusion.errors import ConvFusionError
from convfusion.text import check_prompts

Direct = Annotated[
    bool, typer.Option("--direct", help="Draw at a large size at once, without a ladder.")
]
Strength = Annotated[
    float | None,
    typer.Option(help="Share of the steps that a rung of the ladder takes; 0.3, `mini`: 0.1."),
]
Keep = Annotated[
    bool, typer.Option(help="A rung keeps the low frequencies of the picture below it.")
]
Factor = Annotated[float, typer.Option(help="How much larger a rung is, at most.")]
RungGuidance = Annotated[
    float, typer.Option(help="Guidance of every rung of the ladder but the first; 1 is none.")
]
Memory = Annotated[float, typer.Option(help="GiB that activations may take; 0 for no bound.")]
Hybrid = Annotated[
    bool,
    typer.Option(
        help="Measure first, and use the attention wherever it is the cheaper one at this size."
    ),
]


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to draw; give it again for more.")],
    blocks: Blocks = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures; or a file like x.png, for one.")
    ] = Path("pictures"),
    size: Size = None,
    direct: Direct = False,
    strength: Strength = None,
    keep: Keep = True,
    factor: Factor = 2.0,
    rung_guidance: RungGuidance = 1.0,
    memory: Memory = 0.0,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 5, and 3 for `mini`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = 0,
    hybrid: Hybrid = False,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw pictures. `mini` draws with its shipped student, `mini-teacher` with attention.

    A size beyond one and a half times the model's own is climbed up to: the picture is drawn at the
    model's size, then enlarged and partly drawn anew, rung by rung.
    """
    from convfusion import checkpoint
    from convfusion.families.calls import check_call
    from convfusion.generate import check_numbers, check_size
    from convfusion.highres import Ladder

    check_prompts(prompt)
    one = check_pictures(out, len(prompt))
    check_loading(precision, device)
    seeds = [seed + i for i in range(len(prompt))]
    check_numbers(seeds, steps, 0 if guidance is None else guidance, 1)
    ladder = Ladder(
        factor=factor,
        strength=strength_for(model) if strength is None else strength,
        keep=keep,
        guidance=rung_guidance,
        memory=memory,
        direct=direct,
    )
    wanted = parse_size(size) if size else None
    pipe = load_pipeline(model, precision, device, revision)
    check_call(pipe, prompt, wanted, {})
    if blocks is not None:
        checkpoint.load(pipe, blocks)
    if wanted:
        check_size(pipe, wanted)
    settings = {
        "seeds": seeds,
        "steps": steps,
        "guidance": guidance_for(model, pipe) if guidance is None else guidance,
    }
    with with_cheaper_attention(pipe, wanted) if hybrid else nullcontext():
        images = _draw(pipe, prompt, wanted, ladder, settings)
    for path, image in zip([out] if one else numbered(out, seeds), images, strict=True):
        image.save(path)
        typer.echo(str(path))


def check_pictures(out: Path, count: int) -> bool:
    """Whether `out` names the file of one picture, and not a folder.

    Raises:
        ConvFusionError: it can be neither, or the file is there, or there are more pictures.
    """
    from convfusion.data.pictures import PICTURES

    if out.suffix.lower() not in PICTURES:
        check_folder(out)
        return False
    if count > 1:
        raise ConvFusionError(f"{out} is one picture, and there are {count} prompts: name a folder")
    if out.is_file():
        raise ConvFusionError(f"{out} is there already: choose another name")
    check_file(out)
    return True


def numbered(folder: Path, seeds: list[int]) -> list[Path]:
    """Names of new pictures, counted on from those that the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [path.name[:5] for path in folder.glob("?????-seed*.png")]
    first = max((int(number) + 1 for number in there if number.isdecimal()), default=0)
    return [folder / f"{first + i:05d}-seed{seed}.png" for i, seed in enumerate(seeds)]


def with_cheaper_attention(pipe: Any, size: tuple[int, int] | None) -> AbstractContextManager[None]:
    """Let the attention stand in at the sites where it is the cheaper one at a size in pixels."""
    from convfusion.bench.speed_plan import find_cheaper_attention
    from convfusion.families import latent_scale, native_size
    from convfusion.surgery import attention_back, mixers_of

    scale = latent_scale(pipe)
    height, width = size or native_size(pipe)
    kept = find_cheaper_attention(pipe, (height // scale, width // scale))
    typer.echo(f"The attention is the cheaper one at {len(kept)} of {len(mixers_of(pipe))} sites.")
    return attention_back(pipe, kept)


def _draw(pipe: Any, prompts: list[str], size: Any, ladder: Any, settings: dict[str, Any]) -> Any:
    """Pictures at one go, or by the ladder where the size or a bound on memory asks for it."""
    from convfusion.families import native_size
    from convfusion.generate import generate as run
    from convfusion.highres import highres, is_large, plan_for

    if not ladder.memory and (size is None or not is_large(pipe, size)):
        return run(pipe, prompts, size=size, **settings)
    size = size or native_size(pipe)
    plan = plan_for(pipe, size, ladder, steps=settings["steps"], guidance=settings["guidance"])
    typer.echo(str(plan))
    progress = progress_bar()
    bar = progress.add_task("drawing", total=None)

    def show(rung: int, of: int, step: int, steps: int) -> None:
        height, width = plan.sizes[rung - 1]
        text = f"{width}×{height}, rung {rung} of {of}"
        progress.update(bar, description=text, completed=step, total=steps)

    with progress:
        return highres(pipe, prompts, size, ladder=ladder, on_step=show, **settings)
