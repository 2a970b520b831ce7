"""Whether a student is as good as its teacher: errors, distances, scores, and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convfusion.imports import lazy

if TYPE_CHECKING:
    from convfusion.evaluate.clip import open_clip
    from convfusion.evaluate.epsilon import (
        TIMESTEPS,
        epsilon_error,
        epsilon_errors,
        predictions,
        relative_error,
    )
    from convfusion.evaluate.extractors import open_extractor
    from convfusion.evaluate.images import mean_psnr, psnr, ssim
    from convfusion.evaluate.real import open_real, open_real_clips
    from convfusion.evaluate.results import Evaluation
    from convfusion.evaluate.run import evaluate
    from convfusion.evaluate.scores import (
        clip_scores,
        frechet_distance,
        inception_score,
        kernel_distance,
        neighbourhoods,
    )
    from convfusion.evaluate.settings import EvaluationSettings, plan_evaluation

_HOME = {
    "EvaluationSettings": "settings",
    "plan_evaluation": "settings",
    "TIMESTEPS": "epsilon",
    "epsilon_error": "epsilon",
    "epsilon_errors": "epsilon",
    "predictions": "epsilon",
    "relative_error": "epsilon",
    "open_clip": "clip",
    "open_extractor": "extractors",
    "mean_psnr": "images",
    "psnr": "images",
    "ssim": "images",
    "open_real": "real",
    "open_real_clips": "real",
    "Evaluation": "results",
    "evaluate": "run",
    "clip_scores": "scores",
    "frechet_distance": "scores",
    "inception_score": "scores",
    "kernel_distance": "scores",
    "neighbourhoods": "scores",
}
__all__ = sorted(_HOME)

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
