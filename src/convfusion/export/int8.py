"""The matrix products of an ONNX file in int8, by onnxruntime's own tool."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from convfusion.folders import scratch_folder

PRODUCTS = ["MatMul", "Gemm"]


def quantise(path: Path) -> None:
    """Put the weights of a file's matrix products in int8, in its place.

    There is one scale for each output channel. What the weights are multiplied with is rounded to
    8 bits while the file runs, with the scale that it then needs (`quantize_dynamic`). Products of
    two tensors that are computed, and convolutions, stay in float32.

    Args:
        path: of the file; large weights may lie beside it, in `<name>.data`.
    """
    from onnxruntime.quantization import quantize_dynamic

    beside = path.with_name(f"{path.name}.data")
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice to optimise the file first, which its runner does
    try:
        with scratch_folder(path.parent) as aside:
            quantize_dynamic(
                path,
                aside / path.name,
                op_types_to_quantize=PRODUCTS,
                per_channel=True,
                use_external_data_format=beside.is_file(),
            )
            beside.unlink(missing_ok=True)
            for file in aside.iterdir():
                os.replace(file, path.with_name(file.name))
    finally:
        logging.disable(silenced)
