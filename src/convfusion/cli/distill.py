"""`convfusion distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convfusion.cli.console import describe, progress_bar
from convfusion.cli.models import equip, guidance_for, is_embedded, load_pipeline
from convfusion.cli.options import Config, Device, Model, Precision, check_new, parse_size
from convfusion.errors import ConvFusionError


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
    imitation_steps: Annotated[
        int, typer.Option(min=0, help="First steps, in which each block learns alone.")
    ] = 0,
    from_attention: Annotated[
        bool, typer.Option("--from-attention", help="Start from the measured mean attention.")
    ] = False,
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
    from convfusion.distill import DistillConfig, start_from_attention
    from convfusion.distill import distill as run

    settings = DistillConfig(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        warmup=warmup,
        imitation_steps=imitation_steps,
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
    if from_attention and not resume:
        start_from_attention(pipe, dataset)
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


def find_data(model: str, folder: Path | None) -> Any:
    """What to train on: a folder's pictures and captions, or the embedded latents."""
    from convfusion import mini
    from convfusion.distill import read_image_folder

    if folder is not None:
        return read_image_folder(folder)
    if not is_embedded(model):
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
    from convfusion.generate import generate, swapped_denoiser
    from convfusion.report import labelled_grid

    with torch.no_grad():
        rows = {"student": generate(pipe, prompts, guidance=guidance)}
        with swapped_denoiser(pipe, attention_teacher(denoiser_of(pipe))):
            rows["teacher"] = generate(pipe, prompts, guidance=guidance)
    return labelled_grid(rows, prompts)
