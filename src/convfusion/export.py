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

from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, denoiser_of, example_inputs, family_of, native_latents
from convfusion.families.conditioning import flat, nested
from convfusion.folders import made_folder, scratch_folder
from convfusion.imports import check_installed
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.patches import copied_without_patches
from convfusion.surgery import drop_attention, mixers_of

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of the largest value that PyTorch gives
SINGLE_FILE = (
    3 * 2**29
)  # bytes of weights; beyond them they lie beside the file: protobuf ends at 2 GiB


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the ONNX file; a large model's weights lie beside it, in `<name>.data`.
        inputs: names of its inputs, in order; its output is `output`.
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
    _check(model, path)
    bare = without_attention(model)
    place = Path(os.path.realpath(path))  # a link stays one
    with made_folder(place.parent) as folder, scratch_folder(folder) as aside:
        names = _write(bare, aside / path.name)
        errors = {
            (batch, height, width): _difference(bare, aside / path.name, (height, width), batch)
            for batch, height, width in checked_sizes(model)
        }
        worst = max(errors, key=lambda size: errors[size])
        if not errors[worst] <= TOLERANCE:
            raise ConvFusionError(
                f"the exported file is wrong by {errors[worst]:.1e} at latents "
                f"{worst[1]}×{worst[2]}, so it was not kept"
            )
        for file in sorted(aside.iterdir(), key=lambda file: file.suffix == ".onnx"):
            os.replace(file, place if file.name == path.name else folder / file.name)
    return Exported(path, names, errors)


def checked_sizes(model: Denoiser) -> list[tuple[int, int, int]]:
    """Batches and latents (height, width) at which a file is compared, odd grids among them."""
    unit = family_of(model).latent_unit(model)
    height, width = native_latents(model)
    sizes = [(1, 3 * unit, 5 * unit), (3, 5 * unit, 3 * unit), (2, 4 * unit, 2 * unit)]
    return [*sizes, (1, unit * math.ceil(height / unit), unit * math.ceil(width / unit))]


def without_attention(model: Denoiser) -> Denoiser:
    """A copy that shares all weights with a converted model and lacks the replaced ones."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    bare = copied_without_patches(model, shared)
    drop_attention(bare)
    return bare.eval()


def check_target(path: Path) -> None:
    """Raise a ConvFusionError unless packages are there and a file can be; needs no model."""
    check_installed(*NEEDED)
    if path.suffix != ".onnx" or path.is_dir():
        raise ConvFusionError(f"the file must end in .onnx, unlike {path}")
    if file := next((each for each in path.parents if each.is_file()), None):
        raise ConvFusionError(f"{path} cannot be a file: {file} is no folder")


def _check(model: Denoiser, path: Path) -> None:
    """Everything that can be told before the export."""
    check_target(path)
    mixers = mixers_of(model)
    if not mixers:
        raise ConvFusionError("this model is not converted: there is nothing new to export")
    if family_of(model).fixed_size:
        raise ConvFusionError(
            f"a {type(model).__name__} draws one size only and is not exported: what an export "
            "is for is one file for every size"
        )
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


class _Flat(nn.Module):
    """A denoiser that takes its tensors one after the other.

    Args:
        model: a denoiser.
        names: of its tensors, dotted as in `conditioning.flat`; what it is told as None comes too.
    """

    def __init__(self, model: Denoiser, names: tuple[str, ...], absent: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names, self.absent = model, names, absent

    def forward(self, *tensors: Tensor) -> Tensor:
        for tensor in tensors:  # or each input has a batch of its own
            torch._check(tensor.shape[0] == tensors[0].shape[0])
        told: dict[str, Tensor | None] = dict.fromkeys(self.absent)
        told.update(zip(self.names, tensors, strict=True))
        return self.model(**nested(told), return_dict=False)[0]


def _inputs(model: Denoiser, size: tuple[int, int], batch: int, words: int) -> Mapping[str, Any]:
    """Inputs by dotted name; those that are None too."""
    made = example_inputs(model, size, batch=batch, words=words)
    del made["return_dict"]
    return flat(made)


def _write(model: Denoiser, path: Path) -> tuple[str, ...]:
    """Export to a file; returns the names of its inputs."""
    unit, free = family_of(model).latent_unit(model), torch.export.Dim.DYNAMIC
    given = _inputs(model, (2 * unit, 3 * unit), batch=2, words=7)
    tensors = {name: value for name, value in given.items() if value is not None}
    wrapped = _Flat(model, tuple(tensors), tuple(given.keys() - tensors.keys())).eval()
    shapes = []
    for name, value in tensors.items():
        dims = {0: free}
        if value.dim() == 4:
            dims |= {2: free, 3: free}
        elif name.startswith("encoder_"):
            dims |= {1: free}
        shapes.append(dims)
    names = tuple(name.rpartition(".")[2] for name in tensors)
    weights = sum(p.nbytes for p in model.parameters())
    try:
        with torch.no_grad():
            traced = torch.export.export(
                wrapped, tuple(tensors.values()), dynamic_shapes=(tuple(shapes),), strict=False
            )
            _drop_idle_squeezes(traced)
            program = torch.onnx.export(
                traced, dynamo=True, input_names=list(names), output_names=["output"], verbose=False
            )
    except Exception as error:  # the exporter raises its own kinds, and others of what it calls
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ConvFusionError(f"this model cannot be exported: {reason}") from error
    assert program is not None
    program.save(path, external_data=weights > SINGLE_FILE)
    return names


def _drop_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """Take out squeezes of a dimension that is not 1: PyTorch ignores them, ONNX fails."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            source = node.args[0]
            if node.meta["val"].dim() == source.meta["val"].dim():
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
    program.graph_module.recompile()


@torch.no_grad()
def _difference(model: Denoiser, path: Path, size: tuple[int, int], batch: int) -> float:
    """The largest difference between a file and its model, over the model's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = _inputs(model, size, batch, words=9)
    feed = {
        name.rpartition(".")[2]: value.numpy() for name, value in given.items() if value is not None
    }
    wanted = model(**nested(given), return_dict=False)[0]
    found = torch.from_numpy(session.run(None, feed)[0])
    if found.shape != wanted.shape or not found.isfinite().all():
        return math.inf
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
