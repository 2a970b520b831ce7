"""Converted models as ONNX: the denoiser as a file, or a whole pipeline as a folder."""

from convfusion.export.denoiser import Exported, check_target, export_onnx
from convfusion.export.pipeline import ExportedPipeline, check_folder, export_pipeline

__all__ = [
    "Exported",
    "ExportedPipeline",
    "check_folder",
    "check_target",
    "export_onnx",
    "export_pipeline",
]
