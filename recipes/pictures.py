"""Pictures of the mini models as sets: drawn once, and seen by one network.

Features are kept in `recipes/run/features`, so that a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from convfusion import mini
from convfusion.evaluate import (
    EvaluationSettings,
    frechet_distance,
    kernel_distance,
    open_extractor,
    plan_evaluation,
)
from convfusion.evaluate.real import decoded
from convfusion.generate import generate
from experiment import KEPT, digest

BATCH = 50
DISTANCES = ("kid", "kid_error", "kid_excess", "kid_excess_error", "frechet", "reference_samples")


@dataclass(frozen=True)
class Drawn:
    """Which pictures.

    Attributes:
        samples: how many.
        first_seed: of the first one; the others count on.
        steps: of the pipeline's own scheduler.
        guidance: classifier-free guidance scale.
        size: (height, width) in pixels; None for a DiT, which draws at its own.
    """

    samples: int
    first_seed: int = 0
    steps: int = 25
    guidance: float = mini.GUIDANCE
    size: tuple[int, int] | None = (64, 64)

    def plan(self, prompts: Sequence[str] | None = None) -> EvaluationSettings:
        """Prompts and seeds: by default captions of the list `results`, each as often as any other.

        Of more prompts than are drawn, some that are evenly spread over them.

        Raises:
            ConvFusionError: they cannot be drawn equally often.
        """
        told = mini.held_out_data("results").captions if prompts is None else prompts
        return plan_evaluation(list(told), self.samples, self.first_seed)

    def made(self, by: str) -> str:
        """A hash of what draws, and of how."""
        return digest(by, asdict(self))


def extract_features(
    maker: Callable[[], Any], made: str, drawn: Drawn, prompts: Sequence[str] | None = None
) -> Tensor:
    """Features [samples, 1280] of what a pipeline draws; it is made only if it must draw."""
    told = drawn.plan(prompts)
    file = KEPT / "features" / f"{digest(drawn.made(made), told.prompts)}.safetensors"
    if not file.is_file():
        images = generate(
            maker(), list(told.prompts), seeds=list(told.seeds), steps=drawn.steps,
            guidance=drawn.guidance, size=drawn.size, batch_size=BATCH,
        )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part")
        save_file({"features": extractor()(images).features.contiguous()}, aside)
        aside.replace(file)
    return load_file(file)["features"]


def real_pictures(pipe: Any) -> Tensor:
    """Features of the pictures of `results`, as the model's VAE decodes them."""
    return extractor()(decoded(pipe, mini.held_out_data("results"), "held out", (64, 64))).features


def distances(
    features: Tensor, reference: Tensor, teacher: Tensor | None = None, *, paired: bool = False
) -> dict[str, str]:
    """Kernel distance with its error and Fréchet distance, as the columns of a row.

    Args:
        features: of a student's pictures, or of others.
        reference: features that they are compared with.
        teacher: of the teacher's pictures of the same prompts: how much nearer they are.
        paired: the reference drew the same prompts too.
    """
    kid = kernel_distance(features, reference, paired=paired)
    excess = (
        kid - kernel_distance(teacher, reference, paired=paired) if teacher is not None else None
    )
    values = (
        f"{kid.value:.5f}",
        f"{kid.error:.5f}",
        f"{excess.value:.5f}" if excess else "",
        f"{excess.error:.5f}" if excess else "",
        f"{frechet_distance(features, reference):.3f}",
        str(len(reference)),
    )
    return dict(zip(DISTANCES, values, strict=True))


@cache
def extractor() -> Any:
    return open_extractor("efficientnet-lite0", "cpu")
