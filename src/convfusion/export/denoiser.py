"""A converted denoiser as an ONNX file for any size, compared with PyTorch before it is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convfusion import __version__
from convfusion.errors import ConvFusionError
from convfusion.export.tracing import (
    TOLERANCE,
    check_packages,
    measure_difference,
    run_file,
    save,
    trace,
)
from convfusion.families import Denoiser, denoiser_of, example_inputs, family_of, native_latents
from convfusion.families.conditioning import flatten_conditioning, nest_conditioning
from convfusion.families.patches import copied_without_patches
from convfusion.folders import made_folder, scratch_folder
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.mixers.halo import Halo
from convfusion.surgery import drop_attention, mixers_of

OUTPUT = "what the denoiser predicts of the noisy latents, in the same height and width"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the ONNX file; a large model's weights lie beside it, in `<name>.data`.
        inputs: names of its inputs, in order; its output is `output`. The file itself says what
            each of them is, see `describe_file`.
        errors: by (batch, height, width) of the latents, the largest difference to PyTorch's
            output over the largest value in it.
    """

    path: Path
    inputs: tuple[str, ...]
    errors: dict[tuple[int, int, int], float]


def export_onnx(pipe_or_model: Any, path: str | Path) -> Exported:
    """Write a converted denoiser as ONNX, without the attention that was replaced.

    Batch, height and width of the latents are free, and so is the length of the text; both sides
    must be multiples of what the model halves them by, as in PyTorch. The file is run at several
    sizes, some with odd grids, and takes its place only if it gives what PyTorch gives.

    Args:
        pipe_or_model: a converted pipeline or UNet or PixArt transformer in float32.
        path: of the file, ending in `.onnx`.

    Raises:
        ConvFusionError: packages are missing, the model cannot be exported, or the file computes
            something else. Nothing is written.
    """
    model, path = denoiser_of(pipe_or_model), Path(path)
    check_target(path)
    check_exportable(model)
    place = Path(os.path.realpath(path))  # a link stays one
    with made_folder(place.parent) as folder, scratch_folder(folder) as aside:
        names, errors = write_compared(model, aside / path.name)
        for file in sorted(aside.iterdir(), key=lambda file: file.suffix == ".onnx"):
            os.replace(file, place if file.name == path.name else folder / file.name)
    return Exported(path, names, errors)


def write_compared(
    model: Denoiser, path: Path
) -> tuple[tuple[str, ...], dict[tuple[int, int, int], float]]:
    """Write a converted denoiser and compare the file with it: its inputs and errors.

    Both are as in `Exported`.

    Raises:
        ConvFusionError: it cannot be exported, or the file computes something else.
    """
    bare = copy_without_attention(model)
    names = _write(bare, path)
    errors = {
        (batch, height, width): _measure_difference(bare, path, (height, width), batch)
        for batch, height, width in list_checked_sizes(model)
    }
    worst = max(errors, key=lambda size: errors[size])
    if not errors[worst] <= TOLERANCE:
        raise ConvFusionError(
            f"the exported file is wrong by {errors[worst]:.1e} at latents "
            f"{worst[1]}×{worst[2]}, so it was not kept"
        )
    return names, errors


def list_checked_sizes(model: Denoiser) -> list[tuple[int, int, int]]:
    """Batches and latents (height, width) at which a file is compared, odd grids among them."""
    unit = family_of(model).latent_unit(model)
    height, width = native_latents(model)
    sizes = [(1, 3 * unit, 5 * unit), (3, 5 * unit, 3 * unit), (2, 4 * unit, 2 * unit)]
    return [*sizes, (1, unit * math.ceil(height / unit), unit * math.ceil(width / unit))]


def copy_without_attention(model: Denoiser) -> Denoiser:
    """A copy that shares all weights with a converted model and lacks the replaced ones."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    bare = copied_without_patches(model, shared)
    drop_attention(bare)
    return bare.eval()


def check_target(path: Path) -> None:
    """Raise a ConvFusionError unless packages are there and a file can be; needs no model."""
    check_packages()
    if path.suffix != ".onnx" or path.is_dir():
        raise ConvFusionError(f"the file must end in .onnx, unlike {path}")
    if file := next((parent for parent in path.parents if parent.is_file()), None):
        raise ConvFusionError(f"{path} cannot be a file: {file} is no folder")


def check_exportable(model: Denoiser) -> None:
    """Raise a ConvFusionError for a model that an export of would fail."""
    mixers = mixers_of(model)
    if not mixers:
        raise ConvFusionError("this model is not converted: there is nothing new to export")
    if family_of(model).fixed_size:
        raise ConvFusionError(
            f"a {type(model).__name__} draws one size only and is not exported: what an export "
            "is for is one file for every size"
        )
    family_of(model).check_export(model)
    if getattr(model.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ConvFusionError(
            "an IP-Adapter is not exported: pipe.unload_ip_adapter() takes it off"
        )
    for site, mixer in mixers.items():
        settings = mixer.config
        if (
            isinstance(settings, DeltaConv)
            and settings.pooling == "adaptive"
            and settings.stages > 1
        ):
            raise ConvFusionError(
                f"{site} pools adaptively, which ONNX gets wrong without saying so: convert with "
                'pooling="ceil" and load the same tensors; on even grids both are the same'
            )
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ConvFusionError(
            f"the export takes a model in float32 on the CPU, not {model.dtype} on {model.device}"
        )


class _FlatArguments(nn.Module):
    """A denoiser that takes its tensors one after the other.

    Args:
        model: a denoiser.
        names: of its tensors, dotted as in `flatten_conditioning`.
        absent: further arguments, which are None.
    """

    def __init__(self, model: Denoiser, names: tuple[str, ...], absent: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names, self.absent = model, names, absent

    def forward(self, *tensors: Tensor) -> Tensor:
        for tensor in tensors:  # or each input has a batch of its own
            torch._check(tensor.shape[0] == tensors[0].shape[0])
        arguments: dict[str, Tensor | None] = dict.fromkeys(self.absent)
        arguments.update(zip(self.names, tensors, strict=True))
        return self.model(**nest_conditioning(arguments), return_dict=False)[0]


def _make_inputs(
    model: Denoiser, size: tuple[int, int], batch: int, words: int
) -> Mapping[str, Any]:
    """Inputs by dotted name; those that are None too."""
    inputs = example_inputs(model, size, batch=batch, words=words)
    del inputs["return_dict"]
    return flatten_conditioning(inputs)


def name_axes(name: str, rank: int) -> dict[int, str]:
    """The axes of an input that are free, by their place.

    Args:
        name: of the input.
        rank: how many axes it has.
    """
    if rank == 4:
        return {0: "batch", 2: "height", 3: "width"}
    return {0: "batch", 1: "words"} if name.startswith("encoder_") else {0: "batch"}


def _write(model: Denoiser, path: Path) -> tuple[str, ...]:
    """Export to a file; returns the names of its inputs."""
    unit = family_of(model).latent_unit(model)
    most = _find_largest_block(model)
    inputs = _make_inputs(model, ((most + 1) * unit, (2 * most + 1) * unit), batch=2, words=7)
    tensors = {name: value for name, value in inputs.items() if value is not None}
    wrapped = _FlatArguments(model, tuple(tensors), tuple(inputs.keys() - tensors.keys())).eval()
    flat = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    axes = {name: name_axes(name, value.dim()) for name, value in flat.items()}
    program = trace(wrapped, flat, axes, ["output"])
    describe_file(program.model, model, tuple(tensors))
    save(program, model, path)
    return tuple(flat)


def describe_file(file: Any, model: Denoiser, names: tuple[str, ...]) -> None:
    """Say in an ONNX model what it is and what it takes.

    Its metadata get `model`, `size_unit` (what height and width must be multiples of), and what
    `output` and every input are.

    Args:
        file: the `onnx_ir.Model` that was exported.
        model: the denoiser that it was exported from.
        names: of its inputs in order, dotted as in `flatten_conditioning`.
    """
    unit, docs = family_of(model).latent_unit(model), family_of(model).input_docs
    latents = file.graph.inputs[names.index(family_of(model).latents)]
    file.metadata_props.update(
        producer=f"convfusion {__version__}",
        model=type(model).__name__,
        size_unit=str(unit),
        output=OUTPUT,
    )
    file.graph.outputs[0].doc_string = OUTPUT
    for name, value in zip(names, file.graph.inputs, strict=True):
        if name in docs:
            value.doc_string = file.metadata_props[f"input.{value.name}"] = docs[name]
    for axis in (2, 3):  # else an expression that rounds them to the unit
        file.graph.outputs[0].shape[axis] = latents.shape[axis]


def _find_largest_block(model: Denoiser) -> int:
    """The longest side of a block of queries, in tokens; 1 without.

    A length that is 1 when it is traced stays 1: each grid must have two blocks along each axis.
    """
    mixers = [each.config for each in mixers_of(model).values() if isinstance(each.config, Halo)]
    return max((side for config in mixers for side in config.sides("block")), default=1)


@torch.no_grad()
def _measure_difference(model: Denoiser, path: Path, size: tuple[int, int], batch: int) -> float:
    """The largest difference between a file and its model, over the model's largest value."""
    feed, expected = _call(model, size, batch)
    return measure_difference([expected], path, feed)


@torch.no_grad()
def measure_loss(model: Denoiser, path: Path) -> float:
    """‖ε' − ε‖²/‖ε‖² of what a file predicts, ε', and what its model does, at its own size."""
    *_, (batch, height, width) = list_checked_sizes(model)
    feed, expected = _call(model, (height, width), batch)
    [output] = run_file(path, feed)
    return ((output - expected).square().sum() / expected.square().sum()).item()


def _call(model: Denoiser, size: tuple[int, int], batch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a file by their names in it, and what its model predicts of them."""
    inputs = _make_inputs(model, size, batch, words=9)
    flat = {name.rpartition(".")[2]: value for name, value in inputs.items() if value is not None}
    return flat, model(**nest_conditioning(inputs), return_dict=False)[0]
