"""A module as an ONNX file with free axes, and how far the file is from the module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.imports import check_installed

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of the largest value that PyTorch gives
# Bytes of weights; beyond them they lie beside the file, as protobuf ends at 2 GiB.
SINGLE_FILE = 3 * 2**29

Axes = Mapping[int, str]  # names of the free axes of a tensor, by their place


def check_packages() -> None:
    """Raise a ConvFusionError unless the packages of an export are there."""
    check_installed(*NEEDED)


def trace(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, Axes],
    outputs: Sequence[str],
    what: str = "this model",
) -> Any:
    """Export a module whose forward takes `*tensors`.

    Args:
        module: in evaluation mode.
        tensors: example inputs by name, in order. A length of 1 stays 1.
        axes: of each input, the axes that are free.
        outputs: names of what the module gives.
        what: the module in words, for the error.

    Returns:
        The exporter's program. Its free axes have their names, and the traces of where each
        operation stood in the source, which hold paths of this machine, are gone.

    Raises:
        ConvFusionError: PyTorch cannot export it; the message says why.
    """
    shapes = tuple(dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in tensors)
    try:
        with torch.no_grad():
            traced = torch.export.export(
                module, tuple(tensors.values()), dynamic_shapes=(shapes,), strict=False
            )
            _drop_idle_squeezes(traced)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=list(tensors),
                output_names=list(outputs),
                verbose=False,
            )
    except Exception as error:  # the exporter raises its own kinds, and others of what it calls
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ConvFusionError(f"{what} cannot be exported: {reason}") from error
    assert program is not None
    _name_axes(program.model, axes)
    return program


def save(program: Any, module: nn.Module, path: Path) -> None:
    """Write a traced program; the weights of a large module go into a file beside it."""
    weights = sum(p.nbytes for p in module.parameters())
    program.save(path, external_data=weights > SINGLE_FILE)


def run_file(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of an ONNX file on the CPU, for inputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(output) for output in found]


def measure_difference(
    expected: Sequence[Tensor], path: Path, inputs: Mapping[str, Tensor]
) -> float:
    """How far an ONNX file is from what its module gives, at worst.

    Args:
        expected: the outputs of the module.
        path: of the file.
        inputs: by name.

    Returns:
        The largest difference of an output, over the largest value that is expected of it;
        infinity where shapes differ or a value is not finite.
    """
    return max(map(compare_outputs, run_file(path, inputs), expected))


def compare_outputs(output: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value that is expected, as `measure_difference`."""
    if output.shape != expected.shape or not output.isfinite().all():
        return math.inf
    return ((output - expected).abs().max() / expected.abs().max()).item()


def _name_axes(file: Any, axes: Mapping[str, Axes]) -> None:
    """Call the free axes of an `onnx_ir.Model` by their names, not the exporter's symbols."""
    symbols: dict[str, str] = {}  # of the exporter, such as s77
    for value in file.graph.inputs:
        for axis, word in axes[value.name].items():
            symbols[str(value.shape[axis].value)] = word
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    nodes = list(file.graph)
    for value in (*file.graph.inputs, *(out for node in nodes for out in node.outputs)):
        for axis, length in enumerate(value.shape or ()):
            if not isinstance(length, int) and length.value is not None:
                value.shape[axis] = pattern.sub(lambda m: symbols[m[1]], length.value)
    for node in nodes:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _drop_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """Take out squeezes of a dimension that is not 1: PyTorch ignores them, ONNX fails."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            source = node.args[0]
            if node.meta["val"].dim() == source.meta["val"].dim():
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
    program.graph_module.recompile()
