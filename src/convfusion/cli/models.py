"""Pipelines by name, as the commands load them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convfusion.cli.console import hide_loading_bars
from convfusion.errors import CheckpointError, ConvFusionError, first_line
from convfusion.progress import announced
from convfusion.text import one_line

if TYPE_CHECKING:
    from convfusion.surgery.record import TrainingRecord

PRECISIONS = ("float32", "bfloat16", "float16")

# What tells the pipelines of single files apart: the first tensor whose name begins so.
SINGLE_FILES = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.": "StableDiffusionXLImg2ImgPipeline",  # SDXL's refiner
    "model.diffusion_model.input_blocks.": "StableDiffusionPipeline",
}


def open_pipeline(
    model: str, precision: str, device: str | None, revision: str | None = None
) -> Any:
    """A pipeline by name: embedded, converted on disk, diffusers' own, or in a single file.

    Args:
        model: its name, folder or file.
        precision: `float32`, `bfloat16` or `float16`.
        device: by default the GPU if there is one.
        revision: branch, tag or commit of a name on the Hub.

    Raises:
        ConvFusionError: there is none of that name, a file of it is damaged, or it is of a kind
            that cannot be converted, which is found before its weights are read or fetched.
    """
    check_revision(model, revision)
    dtype, place = parse_precision(precision), parse_device(device)
    with announced(f"Loading {one_line(model)} …", is_first_process()):
        hide_loading_bars()
        return _read_model(model, dtype, revision).to(place)


def _read_model(model: str, dtype: Any, revision: str | None) -> Any:
    from convfusion import mini
    from convfusion.checkpoint import hub, loading

    path = Path(model)
    if is_embedded(model):
        student = mini.NAMES[model]
        pipe = mini.load_teacher() if student is None else mini.load_student(student)
        pipe.to(dtype)
    elif path.is_dir():
        pipe = _read_folder(path, dtype)
    elif path.suffix == ".safetensors":
        pipe = _read_single_file(path, dtype)
    elif path.exists():
        raise ConvFusionError(
            f"{model} is no pipeline: a single file must be a .safetensors, since others can run "
            "code when they are read"
        )
    else:
        fetched = hub.fetch_pipeline(model, revision)
        pipe = loading.read_pipeline(fetched, **loading.in_dtype(dtype))
        pipe.register_to_config(_name_or_path=model)
    return pipe


def warn_if_untrained(pipe: Any) -> None:
    """Say that pictures will be poor where blocks of a pipeline were never trained."""
    from convfusion.surgery import status

    warning = warn_of(status(pipe).record)
    if warning and is_first_process():
        print(warning, file=sys.stderr)


def warn_of(record: TrainingRecord | None) -> str:
    """What to expect of blocks that were never trained; empty for others, and where none can be."""
    if record is None or record.is_trained:
        return ""
    if record.is_started:
        return (
            "These blocks are untrained, started from the attention: halo blocks draw nearly as "
            "before, ΔConvBlocks poorly. `convfusion distill` brings both nearer."
        )
    return (
        "These blocks are untrained: pictures will be poor, or noise, until `convfusion distill` "
        "has trained them."
    )


def is_first_process() -> bool:
    """Whether this process is the one of a launcher's that prints."""
    return os.environ.get("RANK", "0") == "0"


def name_pipeline(model: str, blocks: str | None = None) -> str:
    """What reports and pictures call a pipeline: no path of this machine."""
    name = name_source(model)
    return name if blocks is None else f"{name} with the blocks of {name_source(blocks)}"


def name_source(source: str) -> str:
    """What reports and pictures call a model or blocks: a name, or the last part of a path."""
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else source


def check_blocks(*sources: str | None) -> None:
    """Raise a ConvFusionError for blocks that are nowhere, before a model is loaded for them."""
    from convfusion.checkpoint import find_blocks
    from convfusion.checkpoint.blocks import check_folder

    for source in sources:
        if source is not None and isinstance(found := find_blocks(source), Path) and found.is_dir():
            check_folder(found)


def _read_folder(path: Path, dtype: Any) -> Any:
    """A pipeline on disk, converted or not."""
    from convfusion import checkpoint
    from convfusion.checkpoint import loading, pipelines

    if (path / "convfusion").is_dir():
        return pipelines.load_pipeline(path, **loading.in_dtype(dtype))
    if (path / checkpoint.MANIFEST).is_file() and not (path / loading.INDEX).exists():
        raise ConvFusionError(
            f"{path} holds trained blocks and no pipeline: name the model that they belong to, and "
            "this folder with --blocks"
        )
    return loading.read_pipeline(path, **loading.in_dtype(dtype))


def parse_precision(precision: str) -> Any:
    """The dtype of that name."""
    import torch

    if precision not in PRECISIONS:
        raise ConvFusionError(
            f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}"
        )
    return getattr(torch, precision)


def parse_device(device: str | None) -> Any:
    """The device of that name, tried; without one the GPU if there is one, else the CPU."""
    import torch

    if device is None:  # under a launcher each process has a GPU of its own
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = own if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConvFusionError(f"the device {device!r} cannot be used: {error}") from None


def _read_single_file(path: Path, dtype: Any) -> Any:
    """A pipeline of SD1.x, SD2.x or SDXL whose weights are one file in its makers' layout."""
    import diffusers
    import torch

    from convfusion.checkpoint.loading import in_dtype
    from convfusion.files import few, read_header

    names = list(read_header(path))
    kind = next((k for p, k in SINGLE_FILES.items() if any(n.startswith(p) for n in names)), None)
    if kind is None:
        raise ConvFusionError(
            f"{path} is no single file of SD1.x, SD2.x or SDXL: give a diffusers folder"
        )
    try:
        pipe = getattr(diffusers, kind).from_single_file(str(path), **in_dtype(dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ConvFusionError(
            f"{path} cannot be made a {kind}: a single file lacks configs and tokenisers, which "
            f"diffusers takes from the Hub or its cache ({first_line(error)})"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be made a {kind}: {first_line(error)}") from error
    for part, module in pipe.components.items():
        tensors = module.state_dict() if isinstance(module, torch.nn.Module) else {}
        if missing := [name for name, tensor in tensors.items() if tensor.is_meta]:
            raise CheckpointError(f"{path} lacks {few(missing)} of the {part}")
    return pipe


def open_stock_pipeline(
    model: str, precision: str, device: str | None, revision: str | None = None
) -> Any:
    """A pipeline with its self-attention in place: a converted one is reverted."""
    from convfusion import surgery

    pipe = open_pipeline(model, precision, device, revision)
    if surgery.mixers_of(pipe):
        surgery.revert(pipe)
    return pipe


def check_revision(model: str, revision: str | None) -> None:
    """Raise a ConvFusionError for a revision of what is no name on the Hub."""
    if revision is not None and (is_embedded(model) or Path(model).exists()):
        raise ConvFusionError(f"--revision needs a name on the Hub, and {model} is none")


def check_loading(precision: str, device: str | None) -> None:
    """Raise a ConvFusionError for a precision or device that there is not, before any work."""
    parse_precision(precision)
    parse_device(device)


def check_matplotlib(otherwise: str) -> None:
    """Raise a ConvFusionError unless figures can be drawn."""
    from convfusion.imports import check_installed

    check_installed("matplotlib", advice=otherwise)


def is_embedded(model: str) -> bool:
    """Whether a name is that of the model that comes with the package."""
    from convfusion import mini

    return model in mini.NAMES


def choose_guidance(model: str, pipe: Any = None) -> float:
    """The guidance that a model draws with by default; 1 where its pipeline has no other."""
    from convfusion import mini
    from convfusion.generate import can_guide

    if pipe is not None and not can_guide(pipe):
        return 1.0
    return mini.GUIDANCE if is_embedded(model) else 5.0


def choose_strength(model: str) -> float:
    """The strength of a rung that a model climbs with by default."""
    from convfusion import mini
    from convfusion.highres import Ladder

    return mini.STRENGTH if is_embedded(model) else Ladder().strength


def check_together(
    blocks: str | None, config: str | None, every: int | None, first: int, mixer: str | None
) -> None:
    """Raise a ConvFusionError for options of a conversion that do not go together."""
    if blocks is not None and (config, every, mixer) != (None, None, None):
        raise ConvFusionError(
            "trained blocks bring their own config: give --blocks, or --config, --mixer and --every"
        )
    if first and every is None:
        raise ConvFusionError("--first goes with --every")


def equip(
    pipe: Any,
    blocks: str | None,
    config: str | None,
    every: int | None = None,
    first: int = 0,
    average: bool = True,
    mixer: str | None = None,
) -> Any:
    """Convert a pipeline by preset or config file, or with trained blocks.

    Args:
        pipe: a converted one is left as it is if nothing is asked for, and is reverted otherwise.
        blocks: trained blocks, as `checkpoint.load` takes them.
        config: name of a preset, or path of a JSON file.
        every: convert only every so many-th of the sites, with new blocks.
        first: of them, from 0.
        average: of a released file of blocks, take the moving average.
        mixer: the kind that stands at every site.
    """
    from convfusion import checkpoint, surgery
    from convfusion.families import denoiser_of

    check_together(blocks, config, every, first, mixer)
    if surgery.status(pipe).converted:
        if (blocks, config, every, mixer) == (None, None, None, None):
            return surgery.status(pipe)
        surgery.revert(pipe)
    if blocks is not None:
        return checkpoint.load(pipe, blocks, average=average)
    chosen = choose_conversion(denoiser_of(pipe), config, mixer)
    if every is not None:
        paths = [row.site.path for row in surgery.status(pipe).sites]
        chosen = surgery.select_every(chosen, paths, every, first)
    return surgery.convert(pipe, chosen)


def choose_conversion(denoiser: Any, config: str | None, mixer: str | None = None) -> Any:
    """The conversion of that name or in that file; without one the preset of the layout.

    Args:
        denoiser: whose layout decides.
        config: name of a preset, or path of a JSON file.
        mixer: the kind that stands at every site, in place of a config.
    """
    from convfusion.mixers import MIXERS
    from convfusion.surgery import presets
    from convfusion.surgery.config import ConvertConfig, uniform

    if mixer is not None:
        if config is not None:
            raise ConvFusionError("--config says which mixers to use: leave --mixer out")
        if mixer not in MIXERS:
            raise ConvFusionError(f"--mixer must be one of {', '.join(MIXERS)}, not {mixer!r}")
        if mixer in presets.preset_names():  # with sides for grids of the model's rank
            return presets.get_preset(mixer, denoiser)
        return uniform(MIXERS[mixer]())
    if (
        config is not None
        and config not in presets.preset_names()
        and Path(config).suffix == ".json"
    ):
        return ConvertConfig.load(config)
    return presets.get_preset(config or presets.choose_preset(denoiser), denoiser)
