"""What is measured once all pictures are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convfusion.data.clips import spread_frames
from convfusion.evaluate.clip import Clip
from convfusion.evaluate.drawing import OTHER, SIDES, STUDENT, TEACHER
from convfusion.evaluate.drawn import read_drawn
from convfusion.evaluate.extractors import Extractor, Features
from convfusion.evaluate.images import frame_psnrs, mean_of_psnr, ssim
from convfusion.evaluate.motion import read_sides
from convfusion.evaluate.scores import (
    KernelDistance,
    Mean,
    clip_scores,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_of,
    neighbourhoods,
)
from convfusion.evaluate.settings import EvaluationSettings

REAL = "real"
LOOKED_AT = 8  # frames of a clip whose features are taken
NEIGHBOURS = 5  # that density and coverage look for


@dataclass(frozen=True)
class Likeness:
    """How alike two pictures or clips of one prompt are.

    Attributes:
        psnr: in dB, of clips the mean over frames; None for equal ones.
        ssim: structural similarity, at most 1, of clips the mean over frames.
        cosine: of their features.
    """

    psnr: float | None
    ssim: float
    cosine: float


@dataclass(frozen=True)
class SampleResult:
    """One prompt at one seed.

    Attributes:
        index: number of its pictures.
        prompt: that was drawn.
        seed: of the noise.
        student: the student's picture against the teacher's from the same noise.
        other_seed: the teacher's from another noise against the same picture.
        epsilon_error: mean over timesteps of ‖ε̂ − ε̃‖²/‖ε̃‖² on the teacher's latents, noised.
        latent_error: ‖x̂ − x‖²/‖x‖² of the latents at the end of sampling.
    """

    index: int
    prompt: str
    seed: int
    student: Likeness
    other_seed: Likeness
    epsilon_error: float
    latent_error: float


@dataclass(frozen=True)
class Distribution:
    """A set of pictures against a reference set.

    Attributes:
        pictures: `student`, `teacher` or `teacher-other-seed`.
        reference: `teacher-other-seed` or `real`.
        samples: pictures of the set.
        reference_samples: of the reference.
        frechet: Fréchet distance of the features.
        kid: kernel distance.
        kid_error: its standard error over prompts; None of two prompts.
        kid_excess: how much more it is than the teacher's own against this reference; None for the
            teacher.
        kid_excess_error: the standard error of that, which is less than the two errors would have
            it, since both drew the same prompts.
        precision, recall, density, coverage: as `scores.neighbourhoods`; None for sets that are
            too small.
    """

    pictures: str
    reference: str
    samples: int
    reference_samples: int
    frechet: float
    kid: float
    kid_error: float | None
    kid_excess: float | None
    kid_excess_error: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None


@dataclass(frozen=True)
class SetScores:
    """What is said of a set of pictures by itself: None where nothing could tell.

    Attributes:
        pictures: `student`, `teacher`, `teacher-other-seed` or `real`.
        samples: of them.
        class_score: exp of the mean KL divergence of the extractor's class logits.
        clip: mean CLIP score with the prompts.
        clip_error: its standard error over prompts; None of one prompt.
    """

    pictures: str
    samples: int
    class_score: float | None
    clip: float | None
    clip_error: float | None


@dataclass(frozen=True)
class Curves:
    """Means over all samples, along the way.

    Attributes:
        timesteps: where ε-errors were measured.
        epsilon_errors: mean ‖ε̂ − ε̃‖²/‖ε̃‖² at each.
        steps: timesteps of the sampling run.
        latent_errors: mean ‖x̂ − x‖²/‖x‖² of student and teacher after each step.
        latent_errors_other_seed: the same of the teacher from another noise.
    """

    timesteps: list[int]
    epsilon_errors: list[float]
    steps: list[float]
    latent_errors: list[float]
    latent_errors_other_seed: list[float]


def average_curves(settings: EvaluationSettings, records: list[dict[str, Any]]) -> Curves:
    """The curves that the records of a drawing give."""

    def mean(name: str) -> list[float]:
        return np.mean(list(chain.from_iterable(r[name] for r in records)), axis=0).tolist()

    return Curves(
        timesteps=list(settings.timesteps),
        epsilon_errors=mean("epsilon_errors"),
        steps=records[0]["timesteps"],
        latent_errors=mean("trajectory"),
        latent_errors_other_seed=mean("trajectory_other_seed"),
    )


def compare_samples(
    folder: Path,
    settings: EvaluationSettings,
    records: list[dict[str, Any]],
    seen: dict[str, Features],
) -> list[SampleResult]:
    """Every sample, in order."""
    features = {side: seen[side].features.double() for side in SIDES}
    cosines = {side: torch.cosine_similarity(features[side], features[TEACHER]) for side in SIDES}
    epsilon = chain.from_iterable(record["epsilon_errors"] for record in records)
    latents = chain.from_iterable(record["trajectory"] for record in records)
    rows = zip(read_sides(folder, settings), epsilon, latents, strict=True)
    results = []
    for i, (drawn, errors, strayed) in enumerate(rows):
        alike = {
            side: _compare(drawn[side], drawn[TEACHER], cosines[side][i].item())
            for side in (STUDENT, OTHER)
        }
        results.append(
            SampleResult(
                index=i,
                prompt=settings.prompts[i],
                seed=settings.seeds[i],
                student=alike[STUDENT],
                other_seed=alike[OTHER],
                epsilon_error=float(np.mean(errors)),
                latent_error=strayed[-1],
            )
        )
    return results


def _compare(drawn: np.ndarray, reference: np.ndarray, cosine: float) -> Likeness:
    """How alike two pictures or clips [T, H, W, 3] are."""
    pairs = list(zip(drawn, reference, strict=True))
    similarity = float(np.mean([ssim(frame, other) for frame, other in pairs]))
    return Likeness(mean_of_psnr(frame_psnrs(drawn, reference)).value, similarity, cosine)


def compare_sets(seen: dict[str, Features], prompts: Sequence[str]) -> list[Distribution]:
    """The comparisons that a report shows, each with what the teacher itself has beside it.

    The student is compared with the teacher's pictures from other noises: from equal noises the
    two sets are pairs, and lie closer than chance would have it. `prompts` are those of each drawn
    picture.
    """
    pairs = [(STUDENT, OTHER), (TEACHER, OTHER)]
    if REAL in seen:
        pairs += [(side, REAL) for side in (STUDENT, TEACHER, OTHER)]
    kids = {
        (side, reference): kernel_distance(
            seen[side].features,
            seen[reference].features,
            paired=reference != REAL,
            prompts=prompts,
        )
        for side, reference in pairs
    }
    return [_distribution(seen, kids, *pair) for pair in pairs]


def _distribution(
    seen: dict[str, Features],
    kids: dict[tuple[str, str], KernelDistance],
    side: str,
    reference: str,
) -> Distribution:
    one, other = seen[side].features, seen[reference].features
    kid = kids[side, reference]
    excess = None if side != STUDENT else kid - kids[TEACHER, reference]
    enough = min(len(one), len(other)) > NEIGHBOURS
    near = vars(neighbourhoods(one, other, k_density=NEIGHBOURS)) if enough else {}
    names = ("precision", "recall", "density", "coverage")
    return Distribution(
        side,
        reference,
        len(one),
        len(other),
        frechet_distance(one, other),
        kid.value,
        kid.error,
        excess.value if excess else None,
        excess.error if excess else None,
        **{name: near.get(name) for name in names},
    )


def score_sets(
    seen: dict[str, Features], clips: dict[str, Tensor], prompts: Sequence[str]
) -> list[SetScores]:
    """Scores of each set; `clips` has the CLIP scores [n] of each drawn one, or nothing."""
    scores = []
    for side, each in seen.items():
        clip = mean_of(clips[side].tolist(), prompts) if side in clips else Mean(None, None)
        scores.append(
            SetScores(
                side,
                len(each.features),
                None if each.logits is None else inception_score(each.logits),
                *clip,
            )
        )
    return scores


def extract_features(
    extractor: Extractor, folder: Path, settings: EvaluationSettings
) -> dict[str, Features]:
    """Features of what was drawn; of clips, the mean over some of the frames, without logits."""
    return {side: _extract(extractor, folder, settings, side) for side in SIDES}


def _extract(
    extractor: Extractor, folder: Path, settings: EvaluationSettings, side: str
) -> Features:
    drawn = read_drawn(folder, side, len(settings), settings.frames)
    if settings.frames is None:
        return extractor(Image.fromarray(picture) for (picture,) in drawn)
    return look_at_clips(extractor, drawn, settings.frames)


def look_at_clips(extractor: Extractor, clips: Iterable[np.ndarray], frames: int) -> Features:
    """The mean features of some frames of each clip [T, H, W, 3], without logits."""
    looked = spread_frames(frames, LOOKED_AT)
    seen = extractor(Image.fromarray(frame) for clip in clips for frame in clip[looked])
    return Features(seen.features.unflatten(0, (-1, len(looked))).mean(dim=1), None)


def score_with_clip(
    clip: Clip, folder: Path, settings: EvaluationSettings, texts: Tensor
) -> dict[str, Tensor]:
    """CLIP scores [n] of what was drawn with its prompts, embedded as `texts` [n, d].

    A clip of video has the score of the mean embedding of its frames.
    """
    seen = extract_features(clip.images, folder, settings)
    return {side: clip_scores(each.features, texts) for side, each in seen.items()}
