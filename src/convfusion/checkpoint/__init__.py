"""What is read from and written to disk and the Hub: blocks alone, and whole pipelines."""

from convfusion.checkpoint.blocks import fill, load, save
from convfusion.checkpoint.named import BLOCKS, MANIFEST, PACKAGED, find_blocks
from convfusion.checkpoint.pipelines import load_pipeline, save_pipeline
from convfusion.checkpoint.publish import push

__all__ = [
    "BLOCKS",
    "MANIFEST",
    "PACKAGED",
    "fill",
    "find_blocks",
    "load",
    "load_pipeline",
    "push",
    "save",
    "save_pipeline",
]
