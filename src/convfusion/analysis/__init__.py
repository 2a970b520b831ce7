"""What self-attention does in a pretrained diffusion model, layer by layer."""

from convfusion.analysis.ablation import ablate, save_ablation, variants
from convfusion.analysis.capture import attention_capture
from convfusion.analysis.kernel_sizes import recommend
from convfusion.analysis.statistics import HighPass
from convfusion.analysis.streaming import Measure
from convfusion.analysis.study import Analysis, AnalysisConfig, SiteAnalysis, analyze, untrained

__all__ = [
    "Analysis",
    "AnalysisConfig",
    "HighPass",
    "Measure",
    "SiteAnalysis",
    "ablate",
    "analyze",
    "attention_capture",
    "recommend",
    "save_ablation",
    "untrained",
    "variants",
]
