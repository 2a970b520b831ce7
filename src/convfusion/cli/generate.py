"""`convfusion generate`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.clips import (
    CLIPS,
    Frames,
    Speed,
    check_clips,
    draw_clips,
    name_clips,
    write_clips,
)
from convfusion.cli.console import print_ending
from convfusion.cli.models import (
    check_blocks,
    check_loading,
    choose_guidance,
    choose_strength,
    equip,
    name_pipeline,
    name_source,
    open_pipeline,
    warn_if_untrained,
)
from convfusion.cli.options import (
    Blocks,
    Device,
    Guidance,
    Model,
    NegativePrompt,
    Precision,
    Prompt,
    PromptFile,
    Revision,
    Size,
    Steps,
    check_file,
    check_folder,
    parse_size,
)
from convfusion.errors import ConvFusionError
from convfusion.text import check_prompts, read_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

Pictures = Annotated[
    Path,
    typer.Option(help="Folder for pictures or clips, or the name of one, such as x.png or x.mp4."),
]
Direct = Annotated[
    bool, typer.Option("--direct", help="Draw a large size in one pass, without the ladder.")
]
Strength = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the steps that each rung of the ladder takes. Default: 0.3, and 0.1 for "
        "`mini`."
    ),
]
Keep = Annotated[
    bool,
    typer.Option(help="Whether each rung keeps the low frequencies of the picture before it."),
]
Factor = Annotated[
    float, typer.Option(help="How much larger each rung is than the previous one, at most.")
]
RungGuidance = Annotated[
    float, typer.Option(help="Guidance scale of every rung after the first; 1 is none.")
]
Memory = Annotated[
    float, typer.Option(help="GiB of memory that activations may take; 0 is no limit.")
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        help="Seed of the first picture; the following pictures count up from it. Repeat the "
        "option to draw every prompt with every seed. Default: 0."
    ),
]
Hybrid = Annotated[
    bool,
    typer.Option(
        help="Measure first, and use the original attention at the sites (self-attention "
        "layers) where it is faster at this size."
    ),
]


def generate(
    model: Model,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    negative_prompt: NegativePrompt = "",
    blocks: Blocks = None,
    out: Pictures = Path("convfusion-pictures"),
    size: Size = None,
    direct: Direct = False,
    strength: Strength = None,
    keep: Keep = True,
    factor: Factor = 2.0,
    rung_guidance: RungGuidance = 1.0,
    memory: Memory = 0.0,
    steps: Steps = 25,
    guidance: Guidance = None,
    seed: Seeds = None,
    frames: Frames = None,
    fps: Speed = None,
    hybrid: Hybrid = False,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw pictures or clips. `mini` draws with trained halo blocks, `mini-teacher` with attention.

    A size beyond one and a half times the model's own is drawn as a ladder: first at the model's
    own size, then enlarged and partly redrawn. Each enlargement is a rung.

    Every PNG and clip stores its prompt, seed and settings as text. A model that draws videos
    writes each clip as mp4, with a strip of its frames beside it.
    """
    from convfusion.generate import check_numbers
    from convfusion.highres import Ladder

    texts, seeds = pair_prompts(gather_prompts(prompt, prompts), seed)
    check_prompts([negative_prompt])
    is_file = check_pictures(out, len(texts))
    check_loading(precision, device)
    check_blocks(blocks)
    check_numbers(seeds, steps, 0 if guidance is None else guidance, 1)
    chosen = choose_strength(model) if strength is None else strength
    ladder = Ladder(factor, chosen, keep=keep, guidance=rung_guidance, memory=memory, direct=direct)
    wanted = parse_size(size) if size else None
    options = {"negative_prompt": negative_prompt} if negative_prompt else {}
    pipe = open_pipeline(model, precision, device, revision)
    clips = check_clips(pipe, out, frames, fps, hybrid=hybrid, memory=memory > 0)
    _prepare(pipe, blocks, texts, wanted, options, clips)
    scale = choose_guidance(model, pipe) if guidance is None else guidance
    check_negative_prompt(negative_prompt, scale)
    settings: dict[str, Any] = {"steps": steps, "guidance": scale, **options}
    with keep_cheaper_attention(pipe, wanted) if hybrid else nullcontext():
        told = {"seeds": seeds, **settings}
        draw = partial(draw_clips, frames=frames) if clips else partial(_draw, ladder=ladder)
        drawn: Any = draw(pipe, texts, wanted, settings=told)
    name = name_clips if clips else number_files
    files: Any = zip([out] if is_file else name(out, seeds), drawn, texts, seeds, strict=True)
    settings |= {"model": name_pipeline(model), "blocks": name_source(blocks) if blocks else ""}
    write = partial(write_clips, fps=fps) if clips else write_pictures
    print_ending(*write(pipe, files, **settings))


def gather_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file.

    Raises:
        ConvFusionError: there are none, the file cannot be read, or one is no text.
    """
    texts = [*(prompts or ()), *(read_prompts(file) if file is not None else ())]
    if not texts:
        raise ConvFusionError(
            "what should be drawn? Give --prompt TEXT, or --prompts with a text file"
        )
    check_prompts(texts)
    return texts


def pair_prompts(prompts: list[str], seeds: list[int] | None) -> tuple[list[str], list[int]]:
    """A prompt and a seed for every picture; several seeds go with every prompt."""
    if seeds is None or len(seeds) == 1:
        first = seeds[0] if seeds else 0
        return prompts, [first + i for i in range(len(prompts))]
    return [text for text in prompts for _ in seeds], seeds * len(prompts)


def check_negative_prompt(text: str, guidance: float) -> None:
    """Raise a ConvFusionError for a negative prompt that would change nothing."""
    if text and guidance <= 1:
        raise ConvFusionError("--negative-prompt needs a guidance scale above 1")


def check_pictures(out: Path, count: int) -> bool:
    """Whether `out` names the file of one picture or clip, and not a folder.

    Raises:
        ConvFusionError: it can be neither, or the file is there, or there are more pictures.
    """
    from convfusion.data.clips import check_clip_name
    from convfusion.data.pictures import PICTURES

    is_clip = out.suffix.lower() in CLIPS
    if not is_clip and out.suffix.lower() not in PICTURES:
        check_folder(out)
        return False
    if count > 1:
        kind = "clip" if is_clip else "picture"
        raise ConvFusionError(
            f"{out} is one {kind}, and there are {count} prompts and seeds: name a folder"
        )
    written = (out, out.with_suffix(".png")) if is_clip else (out,)  # with the strip of a clip
    if there := next((path for path in written if path.is_file()), None):
        raise ConvFusionError(f"{there} exists already: choose another name")
    check_file(out)
    if is_clip:
        check_clip_name(out)
    return True


def number_files(folder: Path, seeds: list[int], kind: str = ".png") -> list[Path]:
    """Names of new pictures or clips, counted on from those that the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [path.name[:5] for path in folder.glob("?????-seed*.png")]  # beside clips, too
    first = max((int(number) + 1 for number in there if number.isdecimal()), default=0)
    return [folder / f"{first + i:05d}-seed{seed}{kind}" for i, seed in enumerate(seeds)]


def write_pictures(
    pipe: Any, drawn: Iterable[tuple[Path, Image, str, int]], **settings: Any
) -> list[Path]:
    """Write files, pictures, prompts and seeds, with what they were drawn with as text in them.

    Returns:
        The paths of the files.
    """
    from convfusion.generate import describe_picture, write_picture

    paths = []
    for path, image, prompt, seed in drawn:
        write_picture(path, image, describe_picture(pipe, prompt, seed=seed, **settings))
        paths.append(path)
    return paths


def keep_cheaper_attention(pipe: Any, size: tuple[int, int] | None) -> AbstractContextManager[None]:
    """Let the attention stand in at the sites where it is the faster one at a size in pixels."""
    from convfusion.bench.speed_plan import find_cheaper_attention
    from convfusion.families import latent_scale, native_size
    from convfusion.progress import announced
    from convfusion.surgery import attention_back, mixers_of

    scale = latent_scale(pipe)
    height, width = size or native_size(pipe)
    with announced("Timing attention and blocks …", True):
        kept = find_cheaper_attention(pipe, (height // scale, width // scale))
    typer.echo(f"Attention is faster at {len(kept)} of {len(mixers_of(pipe))} converted sites.")
    return attention_back(pipe, kept)


def _prepare(
    pipe: Any,
    blocks: str | None,
    prompts: list[str],
    size: tuple[int, int] | None,
    options: dict[str, str],
    clips: bool,
) -> None:
    """Put blocks into a pipeline, which can draw what is asked for."""
    from convfusion.families.calls import check_call
    from convfusion.generate import check_size

    check_call(pipe, prompts, size, options, clips=clips)
    if blocks is not None:
        equip(pipe, blocks, None)
    if size:
        check_size(pipe, size)
    warn_if_untrained(pipe)


def _draw(pipe: Any, prompts: list[str], size: Any, ladder: Any, settings: dict[str, Any]) -> Any:
    """Pictures in one pass, or by the ladder where the size or a limit on memory asks for it."""
    from convfusion.families import native_size
    from convfusion.generate import generate as run
    from convfusion.highres import highres, is_large
    from convfusion.highres.ladder import plan_ladder
    from convfusion.progress import Progress

    if not ladder.memory and (size is None or not is_large(pipe, size)):
        return run(pipe, prompts, size=size, progress=True, **settings)
    size = size or native_size(pipe)
    plan = plan_ladder(pipe, size, ladder, steps=settings["steps"], guidance=settings["guidance"])
    typer.echo(str(plan))
    with Progress(True) as progress:
        bar = progress.add("drawing")

        def show(rung: int, of: int, step: int, steps: int) -> None:
            height, width = plan.sizes[rung - 1]
            bar.update(step, total=steps, name=f"drawing {width}×{height}, rung {rung} of {of}")

        return highres(pipe, prompts, size, ladder=ladder, on_step=show, **settings)
