"""Distillation: train the blocks of a converted model to do what its own attention did."""

from convfusion.distill.config import DistillConfig, LossWeights
from convfusion.distill.data import LatentDataset, TrainingData
from convfusion.distill.startup import start_from_attention
from convfusion.distill.task import DistillTask, attention_teacher
from convfusion.distill.trainer import DistillResult, distill

__all__ = [
    "DistillConfig",
    "DistillResult",
    "DistillTask",
    "LatentDataset",
    "LossWeights",
    "TrainingData",
    "attention_teacher",
    "distill",
    "start_from_attention",
]
