"""A whole converted pipeline as a folder of ONNX files, which draws without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convfusion import __version__
from convfusion.checkpoint import saving
from convfusion.errors import ConvFusionError
from convfusion.export.denoiser import check_exportable, measure_loss, write_compared
from convfusion.export.int8 import quantise
from convfusion.export.parts import (
    measure_texts,
    write_decoder,
    write_text_encoder,
    write_tokenizer,
)
from convfusion.export.tracing import TOLERANCE, check_packages
from convfusion.families import (
    Denoiser,
    TextReader,
    check_captioned,
    denoiser_of,
    family_of,
    latent_scale,
    native_size,
)
from convfusion.files import read_json, share_files, write_text
from convfusion.folders import (
    check_only,
    exchange,
    made_folder,
    remove_remains,
    scratch_folder,
    unwritable,
)
from convfusion.surgery import mixers_of, status

INDEX = "pipeline.json"
FORMAT = "convfusion-onnx"
VERSION = 1
DECODER = "vae_decoder"


@dataclass(frozen=True)
class ExportedPipeline:
    """What was written.

    Attributes:
        folder: with all files; `pipeline.json` says what each of them is.
        errors: by part (`text`, the denoiser's component, `vae_decoder`), the largest difference
            to what PyTorch computes over the largest value in it; of the denoiser before it is
            put in int8.
        int8_error: ‖ε' − ε‖²/‖ε‖² between the predictions of the denoiser in int8, ε', and in
            float32, for made-up latents of its own size; None without int8.
    """

    folder: Path
    errors: dict[str, float]
    int8_error: float | None = None


def export_pipeline(
    pipe: Any,
    folder: str | Path,
    *,
    guidance: float = 5.0,
    steps: int = 25,
    int8: bool = False,
    on_part: Callable[[str], None] = lambda part: None,
) -> ExportedPipeline:
    """Write a converted pipeline as ONNX: text encoders, denoiser, VAE decoder, scheduler settings.

    `examples/onnx_generate.py` draws with the folder, and needs neither PyTorch nor diffusers.
    Every part is run in onnxruntime and compared with PyTorch before the folder is in its place. A
    safety checker is not exported.

    Args:
        pipe: a converted text-to-image pipeline of SD1.x, SD2.x, SDXL or PixArt, in float32 on the
            CPU.
        folder: a new or empty one, or one that holds what this function wrote, which is replaced
            in the end.
        guidance: classifier-free guidance scale that pictures are drawn with by default.
        steps: denoising steps by default.
        int8: put the weights of the denoiser's matrix products in 8 bits: a smaller file, a little
            faster on some CPUs, and not quite the same pictures.
        on_part: is told the name of each part before it is written.

    Raises:
        ConvFusionError: packages are missing, the pipeline is of another kind or has something
            that cannot be exported, the folder holds something else, or a file computes something
            else than PyTorch. Nothing is written.
        CheckpointError: the folder cannot be written, as on a full disk.
    """
    folder = Path(folder)
    check_folder(folder)
    readers = _check_pipeline(pipe)
    with made_folder(folder) as place, scratch_folder(place) as aside:
        remove_remains(place)
        try:
            errors = _write(pipe, readers, aside, on_part)
            _check_errors(errors)
            lost = _quantise(denoiser_of(pipe), aside) if int8 else None
            _write_index(pipe, readers, aside, guidance, steps)
            share_files(aside)
            check_folder(place)  # again: that took its time
            exchange(aside, place, lambda name: 0 if name == INDEX else 1)
        except ConvFusionError:
            raise
        except Exception as error:  # of the many that libraries have for a full disk
            raise unwritable(folder, error) from error
    return ExportedPipeline(folder, errors, lost)


def check_folder(folder: Path) -> None:
    """Raise a ConvFusionError unless packages are there and a folder can be; needs no model."""
    check_packages()
    place = folder.resolve()
    record = read_json(place / INDEX) if (place / INDEX).is_file() else {}
    files = record.get("files", []) if isinstance(record, dict) else []
    why = "an export replaces a folder that it wrote and nothing else; name another one"
    check_only(place, {str(name) for name in files}, why)


def _check_pipeline(pipe: Any) -> tuple[TextReader, ...]:
    """How a pipeline reads its prompts; a ConvFusionError for one that an export of would fail."""
    if isinstance(pipe, nn.Module):
        raise ConvFusionError(
            f"a {type(pipe).__name__} is a denoiser: export_onnx writes it by itself"
        )
    model = denoiser_of(pipe)
    check_exportable(model)
    check_captioned(pipe)
    readers = family_of(model).text_readers(pipe)
    apart = tuple(f"{path}.mixer." for path in mixers_of(model))
    apart += tuple(f"{row.site.path}." for row in status(model).sites)
    for part in ("vae", *(reader.encoder for reader in readers)):
        module = getattr(pipe, part)
        saving.check_component(part, module)
        if module.dtype != torch.float32 or module.device.type != "cpu":
            raise ConvFusionError(
                f"the export takes a pipeline in float32 on the CPU, and its {part} is in "
                f"{module.dtype} on {module.device}"
            )
    saving.check_component(family_of(model).component, model, apart)
    return readers


def _write(
    pipe: Any, readers: tuple[TextReader, ...], aside: Path, on_part: Callable[[str], None]
) -> dict[str, float]:
    """All files but the index; returns how far each part is from PyTorch."""
    model = denoiser_of(pipe)
    component = family_of(model).component
    for reader in readers:
        on_part(reader.encoder)
        write_tokenizer(pipe, reader, aside / reader.tokenizer / "tokenizer.json")
        write_text_encoder(pipe, reader, aside / reader.encoder / "model.onnx")
    errors = {"text": measure_texts(pipe, readers, aside)}
    (aside / component).mkdir()
    on_part(component)
    _, found = write_compared(model, aside / component / "model.onnx")
    errors[component] = max(found.values())
    on_part(DECODER)
    errors[DECODER] = write_decoder(pipe, aside / DECODER / "model.onnx")
    pipe.scheduler.save_config(aside / "scheduler")
    return errors


def _check_errors(errors: dict[str, float]) -> None:
    worst = max(errors, key=lambda part: errors[part])
    if not errors[worst] <= TOLERANCE:
        raise ConvFusionError(
            f"the exported {worst} is wrong by {errors[worst]:.1e}, so nothing was kept"
        )


def _quantise(model: Denoiser, aside: Path) -> float:
    """Put the denoiser's matrix products in int8; returns `int8_error`."""
    path = aside / family_of(model).component / "model.onnx"
    quantise(path)
    return measure_loss(model, path)


def _write_index(
    pipe: Any, readers: tuple[TextReader, ...], aside: Path, guidance: float, steps: int
) -> None:
    """Write `pipeline.json`: which file is what, and the numbers that drawing needs."""
    model = denoiser_of(pipe)
    family, (height, width) = family_of(model), native_size(pipe)
    scale, shift = _scale_latents(pipe)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "producer": f"convfusion {__version__}",
        "pipeline": type(pipe).__name__,
        "text": [
            {
                "tokenizer": f"{reader.tokenizer}/tokenizer.json",
                "encoder": f"{reader.encoder}/model.onnx",
                "lower_case": reader.lowered,
            }
            for reader in readers
        ],
        "zero_negative": bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
        "denoiser": {
            "file": f"{family.component}/model.onnx",
            "latents": family.latents,
            "channels": model.config.in_channels,
        },
        "decoder": {"file": f"{DECODER}/model.onnx", "scale": scale, "shift": shift},
        "scheduler": "scheduler/scheduler_config.json",
        "pixels_per_latent": latent_scale(pipe),
        "size_unit": latent_scale(pipe) * family.latent_unit(model),
        "height": height,
        "width": width,
        "guidance": guidance,
        "steps": steps,
    }
    files = sorted(
        path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()
    )
    text = json.dumps({**index, "files": [*files, INDEX]}, indent=2)
    write_text(aside / INDEX, text + "\n")


def _scale_latents(pipe: Any) -> tuple[list[float], list[float]]:
    """Factors and summands, by channel, that make latents what the VAE decodes."""
    config = pipe.vae.config
    channels = config.latent_channels
    spread = config.get("latents_std") or [1.0] * channels
    shift = config.get("latents_mean") or [0.0] * channels
    return [each / config.scaling_factor for each in spread], list(shift)
