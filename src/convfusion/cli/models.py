"""Pipelines by name, as the commands load them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from convfusion.cli.console import hide_loading_bars
from convfusion.errors import ConvFusionError, first_line

PRECISIONS = ("float32", "bfloat16", "float16")

# What tells the pipelines of single files apart: the first tensor whose name begins so.
SINGLE_FILES = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.": "StableDiffusionXLImg2ImgPipeline",  # SDXL's refiner
    "model.diffusion_model.input_blocks.": "StableDiffusionPipeline",
}


def load_pipeline(
    model: str, precision: str, device: str | None, revision: str | None = None
) -> Any:
    """A pipeline by name: embedded, converted on disk, diffusers' own, or in a single file.

    Args:
        model: its name, folder or file.
        precision: `float32`, `bfloat16` or `float16`.
        device: by default the GPU if there is one.
        revision: branch, tag or commit of a name on the Hub.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HFValidationError

    from convfusion import mini, pipelines

    hide_loading_bars()
    dtype, place = torch_dtype(precision), torch_device(device)
    check_revision(model, revision)
    if is_embedded(model):
        pipe = mini.load_student() if model == "mini" else mini.load_teacher()
        pipe.to(dtype)
    elif (Path(model) / "convfusion").is_dir():
        pipe = pipelines.load_pipeline(model, **pipelines.in_dtype(dtype))
    elif Path(model).suffix == ".safetensors":
        pipe = _single_file(Path(model), dtype)
    else:
        try:
            pipe = DiffusionPipeline.from_pretrained(
                model, revision=revision, use_safetensors=True, **pipelines.in_dtype(dtype)
            )
        except (OSError, HFValidationError) as error:
            wanted = f" (revision {revision})" if revision else ""
            raise ConvFusionError(
                f"{model} is no pipeline: no diffusers folder is there, or the Hub has none of "
                f"that name{wanted} or cannot be reached ({first_line(error)})"
            ) from None
    return pipe.to(place)


def torch_dtype(precision: str) -> Any:
    """The dtype of that name."""
    import torch

    if precision not in PRECISIONS:
        raise ConvFusionError(
            f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}"
        )
    return getattr(torch, precision)


def torch_device(device: str | None) -> Any:
    """The device of that name, tried; without one the GPU if there is one, else the CPU."""
    import torch

    if device is None:  # under a launcher each process has a GPU of its own
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = own if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConvFusionError(f"the device {device!r} cannot be used: {error}") from None


def _single_file(path: Path, dtype: Any) -> Any:
    """A pipeline of SD1.x, SD2.x or SDXL whose weights are one file in its makers' layout."""
    import diffusers

    from convfusion.files import read_header
    from convfusion.pipelines import in_dtype

    names = list(read_header(path))
    kind = next((k for p, k in SINGLE_FILES.items() if any(n.startswith(p) for n in names)), None)
    if kind is None:
        raise ConvFusionError(
            f"{path} is no single file of SD1.x, SD2.x or SDXL: give a diffusers folder"
        )
    try:
        return getattr(diffusers, kind).from_single_file(str(path), **in_dtype(dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ConvFusionError(
            f"{path} cannot be made a {kind}: a single file lacks configs and tokenisers, which "
            f"diffusers takes from the Hub or its cache ({first_line(error)})"
        ) from None


def stock_pipeline(
    model: str, precision: str, device: str | None, revision: str | None = None
) -> Any:
    """A pipeline with its self-attention in place: a converted one is reverted."""
    from convfusion import surgery

    pipe = load_pipeline(model, precision, device, revision)
    if surgery.mixers_of(pipe):
        surgery.revert(pipe)
    return pipe


def check_revision(model: str, revision: str | None) -> None:
    """Raise a ConvFusionError for a revision of what is no name on the Hub."""
    if revision is not None and (is_embedded(model) or Path(model).exists()):
        raise ConvFusionError(f"--revision is of a name on the Hub: {model} is none")


def check_loading(precision: str, device: str | None) -> None:
    """Raise a ConvFusionError for a precision or device that there is not, before any work."""
    torch_dtype(precision)
    torch_device(device)


def needs_matplotlib(otherwise: str) -> None:
    """Raise a ConvFusionError unless figures can be drawn."""
    from convfusion.extras import check_installed

    check_installed("matplotlib", advice=otherwise)


def is_embedded(model: str) -> bool:
    """Whether a name is that of the model that comes with the package."""
    from convfusion import mini

    return model in mini.NAMES


def guidance_for(model: str, pipe: Any = None) -> float:
    """The guidance that a model draws with by default; 1 where its pipeline has no other."""
    from convfusion import mini
    from convfusion.generate import can_guide

    if pipe is not None and not can_guide(pipe):
        return 1.0
    return mini.GUIDANCE if is_embedded(model) else 5.0


def strength_for(model: str) -> float:
    """The strength of a rung that a model climbs with unless told otherwise."""
    from convfusion import mini
    from convfusion.highres import Ladder

    return mini.STRENGTH if is_embedded(model) else Ladder().strength


def equip(
    pipe: Any,
    blocks: Path | None,
    config: str | None,
    every: int | None = None,
    first: int = 0,
    average: bool = True,
) -> Any:
    """Convert a pipeline by preset or config file, or with trained blocks.

    Args:
        pipe: a converted one is left as it is if nothing is asked for, and is reverted otherwise.
        blocks: trained blocks, as `checkpoint.load` takes them.
        config: name of a preset, or path of a JSON file.
        every: convert only every so many-th of the sites, with new blocks.
        first: of them, from 0.
        average: of a released file of blocks, take the moving average.
    """
    from convfusion import checkpoint, surgery
    from convfusion.adapters import denoiser_of

    if blocks is not None and (config is not None or every is not None):
        raise ConvFusionError(
            "trained blocks bring their own config: give --blocks, or --config and --every"
        )
    if first and every is None:
        raise ConvFusionError("--first goes with --every")
    if surgery.status(pipe).converted:
        if blocks is None and config is None and every is None:
            return surgery.status(pipe)
        surgery.revert(pipe)
    if blocks is not None:
        return checkpoint.load(pipe, blocks, average=average)
    chosen = conversion_for(denoiser_of(pipe), config)
    if every is not None:
        from convfusion.distill import partial

        paths = [row.site.path for row in surgery.status(pipe).sites]
        chosen = partial.every(chosen, paths, every, first)
    return surgery.convert(pipe, chosen)


def conversion_for(denoiser: Any, config: str | None) -> Any:
    """The conversion of that name or in that file; without one the preset of the layout."""
    from convfusion import presets
    from convfusion.config import ConvertConfig

    if config is not None and config not in presets.PRESETS and Path(config).suffix == ".json":
        return ConvertConfig.load(config)
    return presets.by_name(config or presets.preset_for(denoiser))
