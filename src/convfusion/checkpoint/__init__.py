"""What is read from and written to disk and the Hub: blocks alone, and whole pipelines."""

from convfusion.checkpoint.blocks import BLOCKS, MANIFEST, fill, load, push, save
from convfusion.checkpoint.pipelines import load_pipeline, save_pipeline

__all__ = [
    "BLOCKS",
    "MANIFEST",
    "fill",
    "load",
    "load_pipeline",
    "push",
    "save",
    "save_pipeline",
]
