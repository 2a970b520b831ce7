"""The command line: thin, each command calls what a script would call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.console import (
    describe,
    fail,
    hide_loading_bars,
    print_results,
    progress_bar,
    quiet_libraries,
)
from convfusion.errors import ConvFusionError

app = typer.Typer(
    name="convfusion",
    help="Diffusion models without self-attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(help="A diffusers pipeline: folder or Hub name; `mini` is the embedded model."),
]
Blocks = Annotated[
    Path | None, typer.Option(help="Trained blocks: a folder that `distill` or `save` wrote.")
]
Config = Annotated[
    str | None,
    typer.Option(help="Preset (sd15, sd21, sdxl, pixart, dit, default) or JSON file of a config."),
]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, …; by default the GPU if there is one.")
]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    quiet_libraries()
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ConvFusionError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer says of wrong usage
            raise
        fail(f"{error.format_message()} Try --help.")
    sys.exit(status if isinstance(status, int) else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json, grid.png, report.html.")] = Path(
        "out"
    ),
    steps: Annotated[int, typer.Option(help="Distillation steps.", min=1)] = 400,
    seed: Annotated[int, typer.Option(help="Of the distillation.")] = 0,
) -> None:
    """Take the embedded model's self-attention away and distil its replacement, live."""
    from convfusion.demo import distillation, run_demo

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


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the converted pipeline.")],
    config: Config = None,
    blocks: Blocks = None,
    drop_attention: Annotated[
        bool, typer.Option("--drop-attention", help="Leave the replaced weights out.")
    ] = False,
    precision: Precision = "float32",
) -> None:
    """Put ΔConvBlocks in place of self-attention and write the pipeline to a folder.

    Without --blocks they are untrained: go on with `convfusion distill`.
    """
    from convfusion import checkpoint, surgery

    check_new(out)
    pipe = load_pipeline(model, precision, "cpu")
    status = equip(pipe, blocks, config)
    if drop_attention:
        status = surgery.drop_attention(pipe)
    checkpoint.save_pipeline(pipe, out)
    typer.echo(str(status))
    typer.echo(f"Written: {out}")


@app.command()
def distill(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for blocks, checkpoints and logs.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures, each with its caption in NAME.txt beside it."),
    ] = None,
    config: Config = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of training pictures.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Parts to work a batch in.")] = 1,
    learning_rate: float = 3e-4,
    warmup: int = 100,
    decay: Annotated[float, typer.Option(help="Share of steps of the final decay.")] = 0.0,
    weight_decay: float = 0.01,
    caption_drop: float = 0.15,
    autocast: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    checkpointing: Annotated[bool, typer.Option(help="Trade time for memory.")] = False,
    save_every: Annotated[int, typer.Option(min=1)] = 500,
    validate_every: Annotated[int, typer.Option(min=0)] = 500,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompts of the validation pictures.")
    ] = None,
    seed: int = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Train the blocks of a pipeline against its own attention.

    Ctrl-C stops after the step at hand and saves; go on with --resume.
    """
    from convfusion.distill import DistillConfig
    from convfusion.distill import distill as run

    settings = DistillConfig(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        warmup=warmup,
        decay=decay,
        weight_decay=weight_decay,
        caption_drop=caption_drop,
        precision=autocast,
        checkpointing=checkpointing,
        save_every=save_every,
        validate_every=validate_every,
        seed=seed,
    )
    if not resume:
        check_new(out)
    samples = find_data(model, data)
    pipe = load_pipeline(model, precision, device)
    equip(pipe, None, config)
    dataset = samples if data is None else encode(pipe, samples, size)
    prompts = prompt or dataset.captions[:4]
    progress = progress_bar()
    bar = progress.add_task("distilling", total=steps)
    with progress:
        result = run(
            pipe,
            dataset,
            settings,
            out,
            resume=resume,
            on_step=lambda step, terms: progress.update(
                bar, completed=step, description=describe(terms)
            ),
            validate=lambda pipe, step: validation_grid(pipe, prompts, guidance_for(model)),
        )
    if result.stopped:
        typer.echo(f"Stopped after step {result.steps}. Go on with the same command and --resume.")
    typer.echo(f"Written: {out}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to draw; give it again for more.")],
    blocks: Blocks = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 5, and 3 for `mini`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = 0,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Draw pictures. `mini` draws with its shipped student, `mini-teacher` with attention."""
    from convfusion import checkpoint
    from convfusion.generate import check_size
    from convfusion.generate import generate as run

    pipe = load_pipeline(model, precision, device)
    if blocks is not None:
        checkpoint.load(pipe, blocks)
    wanted = parse_size(size) if size else None
    if wanted:
        check_size(pipe, wanted)
    seeds = [seed + i for i in range(len(prompt))]
    out.mkdir(parents=True, exist_ok=True)
    guidance = guidance_for(model) if guidance is None else guidance
    images = run(pipe, prompt, seeds=seeds, steps=steps, guidance=guidance, size=wanted)
    first = len(list(out.glob("*.png")))
    for i, (image, number) in enumerate(zip(images, seeds, strict=True)):
        path = out / f"{first + i:05d}-seed{number}.png"
        image.save(path)
        typer.echo(str(path))


def load_pipeline(model: str, precision: str, device: str | None) -> Any:
    """A pipeline by name: embedded, converted on disk, or diffusers' own."""
    import torch
    from diffusers import DiffusionPipeline

    from convfusion import checkpoint, mini

    hide_loading_bars()
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if precision not in dtypes:
        raise ConvFusionError(f"precision must be one of {', '.join(dtypes)}, not {precision!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model in ("mini", "mini-teacher"):
        pipe = mini.load_student() if model == "mini" else mini.load_teacher()
        pipe.to(dtypes[precision])
    elif (Path(model) / "convfusion").is_dir():
        pipe = checkpoint.load_pipeline(model, torch_dtype=dtypes[precision])
    else:
        pipe = DiffusionPipeline.from_pretrained(
            model, torch_dtype=dtypes[precision], use_safetensors=True
        )
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConvFusionError(f"the device {device!r} cannot be used: {error}") from None


def guidance_for(model: str) -> float:
    """The guidance that a model draws with unless told otherwise."""
    from convfusion import mini

    return mini.GUIDANCE if model.startswith("mini") else 5.0


def equip(pipe: Any, blocks: Path | None, config: str | None) -> Any:
    """Convert a pipeline by preset or config file, or with trained blocks."""
    from convfusion import checkpoint, surgery
    from convfusion.config import ConvertConfig
    from convfusion.presets import PRESETS

    if blocks is not None and config is not None:
        raise ConvFusionError("give --blocks or --config: trained blocks bring their own config")
    if surgery.status(pipe).converted:
        if blocks is None and config is None:
            return surgery.status(pipe)
        surgery.revert(pipe)
    if blocks is not None:
        return checkpoint.load(pipe, blocks)
    if config is not None and config not in PRESETS and Path(config).suffix == ".json":
        return surgery.convert(pipe, ConvertConfig.load(config))
    return surgery.convert(pipe, config)


def find_data(model: str, folder: Path | None) -> Any:
    """What to train on: a folder's pictures and captions, or the embedded latents."""
    from convfusion import mini
    from convfusion.distill import read_image_folder

    if folder is not None:
        return read_image_folder(folder)
    if model not in ("mini", "mini-teacher"):
        raise ConvFusionError("--data is needed: a folder of pictures with captions")
    return mini.training_data()


def encode(pipe: Any, samples: list[tuple[Path, str]], size: str | None) -> Any:
    """The latents of pictures with captions, at a size or the pipeline's own."""
    from convfusion.adapters import denoiser_of
    from convfusion.conditioning import latent_scale
    from convfusion.distill import LatentDataset
    from convfusion.distill.data import encode_pictures
    from convfusion.generate import check_size

    native = denoiser_of(pipe).config.sample_size * latent_scale(pipe)
    wanted = parse_size(size) if size else (native, native)
    check_size(pipe, wanted)
    latents = encode_pictures(pipe.vae, [path for path, _ in samples], wanted)
    return LatentDataset(latents, [caption for _, caption in samples])


def validation_grid(pipe: Any, prompts: list[str], guidance: float) -> Any:
    """The prompts drawn by teacher and student from equal seeds."""
    import torch

    from convfusion.adapters import denoiser_of
    from convfusion.distill import attention_teacher
    from convfusion.generate import generate
    from convfusion.report import labelled_grid

    student = denoiser_of(pipe)
    name = "unet" if getattr(pipe, "unet", None) is student else "transformer"
    rows = {}
    with torch.no_grad():
        rows["student"] = generate(pipe, prompts, guidance=guidance)
        setattr(pipe, name, attention_teacher(student))
        try:
            rows["teacher"] = generate(pipe, prompts, guidance=guidance)
        finally:
            setattr(pipe, name, student)
    return labelled_grid(rows, prompts)


def check_new(out: Path) -> None:
    """Refuse to write into a folder that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvFusionError(f"{out} exists and is not empty: choose another folder")


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` → (height, width)."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ConvFusionError(f"a size looks like 512x768 (width x height), not {text!r}")
    return int(height), int(width)


if __name__ == "__main__":
    main()
