"""What self-attention does in a pretrained diffusion model, layer by layer."""

from convfusion.analysis.ablation import ablate, list_variants, save_ablation
from convfusion.analysis.capture import attention_capture
from convfusion.analysis.kernel_sizes import recommend
from convfusion.analysis.statistics import HighPass
from convfusion.analysis.streaming import Measure
from convfusion.analysis.study import (
    Analysis,
    AnalysisConfig,
    SiteAnalysis,
    analyze,
    build_untrained,
)
from convfusion.analysis.verdict import give_verdict

__all__ = [
    "Analysis",
    "AnalysisConfig",
    "HighPass",
    "Measure",
    "SiteAnalysis",
    "ablate",
    "analyze",
    "attention_capture",
    "build_untrained",
    "give_verdict",
    "list_variants",
    "recommend",
    "save_ablation",
]
