"""ConvFusion: diffusion models without self-attention.

import convfusion

convfusion.convert(pipe)                    # ΔConvBlocks in place of every self-attention
convfusion.load(pipe, "my-blocks")          # trained ones, from disk
convfusion.revert(pipe)                     # the original, bit for bit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convfusion.imports import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convfusion.checkpoint import load, save
    from convfusion.checkpoint.pipelines import load_pipeline, save_pipeline
    from convfusion.errors import CheckpointError, ConvFusionError, UnsupportedModelError
    from convfusion.mixers import DeltaConv, DeltaConvBlock, Halo, MeanOnly, Removed
    from convfusion.surgery import convert, drop_attention, revert, start_from_attention, status
    from convfusion.surgery.config import ConvertConfig, uniform, with_kernel_sizes

# Loaded at first use, so that `convfusion --help` does not wait for torch and diffusers.
_HOME = {
    "DeltaConv": "mixers",
    "DeltaConvBlock": "mixers",
    "Halo": "mixers",
    "load": "checkpoint",
    "load_pipeline": "checkpoint",
    "save": "checkpoint",
    "save_pipeline": "checkpoint",
    "ConvertConfig": "surgery",
    "uniform": "surgery",
    "with_kernel_sizes": "surgery",
    "CheckpointError": "errors",
    "ConvFusionError": "errors",
    "UnsupportedModelError": "errors",
    "MeanOnly": "mixers",
    "Removed": "mixers",
    "convert": "surgery",
    "drop_attention": "surgery",
    "revert": "surgery",
    "start_from_attention": "surgery",
    "status": "surgery",
}
_MODULES = (
    "analysis",
    "bench",
    "checkpoint",
    "data",
    "distill",
    "evaluate",
    "families",
    "generate",
    "highres",
    "mini",
    "mixers",
    "operations",
    "surgery",
)
__all__ = [*sorted(_HOME), "__version__"]


__getattr__ = lazy(__name__, _HOME, _MODULES)


def __dir__() -> list[str]:
    return __all__
