"""Distillation: train the blocks of a converted model to do what its own attention did."""

from convfusion.distill.data import LatentDataset, read_image_folder
from convfusion.distill.startup import start_from_attention
from convfusion.distill.task import DistillTask, LossWeights, attention_teacher
from convfusion.distill.trainer import DistillConfig, DistillResult, distill

__all__ = [
    "DistillConfig",
    "DistillResult",
    "DistillTask",
    "LatentDataset",
    "LossWeights",
    "attention_teacher",
    "distill",
    "read_image_folder",
    "start_from_attention",
]
