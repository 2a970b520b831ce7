"""Clips compared: how close their frames are, and how much they change and flicker.

Of a clip v of T frames, with values of 0 … 255:

    change    mean |v[t+1] − v[t]|                    over t, pixels and colours
    flicker   mean |v[t] − (v[t−1] + v[t+1]) / 2|     how far a frame is from its two neighbours

What moves changes. Flicker is what changes and goes back: it is 0 where brightness rises or falls
evenly, and twice the amplitude where it alternates. Motion has some of it too, at edges that pass
by, so that a clip's flicker is read beside that of the teacher's clip from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convfusion.evaluate.drawing import OTHER, SIDES, STUDENT, TEACHER
from convfusion.evaluate.drawn import read_drawn
from convfusion.evaluate.images import frame_psnrs, mean_of_psnr
from convfusion.evaluate.scores import Mean, mean_of, standard_error
from convfusion.evaluate.settings import EvaluationSettings


@dataclass(frozen=True)
class Motion:
    """How the clips of an evaluation move, a number for each clip, by side.

    Attributes:
        change: mean |v[t+1] − v[t]|, of 255.
        flicker: mean |v[t] − (v[t−1] + v[t+1])/2|, of 255; 0 of clips of two frames or fewer.
        frame_psnr: of the student and of the teacher from other noises, by frame: the mean over
            clips of the PSNR in dB against the teacher's frame; None where all are equal.
        frame_psnr_error: its standard error over prompts; None of one prompt.
    """

    change: dict[str, list[float]]
    flicker: dict[str, list[float]]
    frame_psnr: dict[str, list[float | None]]
    frame_psnr_error: dict[str, list[float | None]]


def measure_change(clip: np.ndarray) -> float:
    """Mean absolute change from one frame of [T, H, W, 3] to the next; 0 of a single frame."""
    return _mean_over_frames(len(clip) - 1, lambda t: _frame(clip, t + 1) - _frame(clip, t))


def measure_flicker(clip: np.ndarray) -> float:
    """Mean distance of a frame of [T, H, W, 3] from the mean of the two beside it; 0 for T < 3."""
    return _mean_over_frames(
        len(clip) - 2,
        lambda t: _frame(clip, t + 1) - (_frame(clip, t) + _frame(clip, t + 2)) / 2,
    )


def measure_motion(folder: Path, settings: EvaluationSettings) -> Motion:
    """How the clips of a drawing move, and how far their frames are from the teacher's."""
    change: dict[str, list[float]] = {side: [] for side in SIDES}
    flicker: dict[str, list[float]] = {side: [] for side in SIDES}
    close: dict[str, list[list[float | None]]] = {STUDENT: [], OTHER: []}
    for clips in read_sides(folder, settings):
        for side, clip in clips.items():
            change[side].append(measure_change(clip))
            flicker[side].append(measure_flicker(clip))
        for side, rows in close.items():
            rows.append(frame_psnrs(clips[side], clips[TEACHER]))
    means = {
        side: [mean_of_psnr(frame, settings.prompts) for frame in zip(*rows, strict=True)]
        for side, rows in close.items()
    }
    return Motion(
        change,
        flicker,
        {side: [mean.value for mean in row] for side, row in means.items()},
        {side: [mean.error for mean in row] for side, row in means.items()},
    )


def read_sides(folder: Path, settings: EvaluationSettings) -> Iterator[dict[str, np.ndarray]]:
    """What each side drew of a sample after the other: uint8 [T, H, W, 3]."""
    drawn = [read_drawn(folder, side, len(settings), settings.frames) for side in SIDES]
    for clips in zip(*drawn, strict=True):
        yield dict(zip(SIDES, clips, strict=True))


def ratio_of_means(
    values: Sequence[float], references: Sequence[float], prompts: Sequence[str]
) -> Mean:
    """Σ v / Σ r of paired numbers, with its standard error over prompts.

    The error is that of the linearised ratio, the mean of (v − R·r) / mean r (Cochran 1977, §2.11).
    None where all references are 0.
    """
    mean = float(np.mean(references))
    if mean == 0:
        return Mean(None, None)
    ratio = float(np.mean(values)) / mean
    rests = (np.asarray(values) - ratio * np.asarray(references)) / mean
    return Mean(ratio, standard_error(rests.tolist(), prompts))


def sum_up_motion(motion: Motion, prompts: Sequence[str]) -> Iterator[tuple[str, str, str, Mean]]:
    """The numbers of `evaluation.csv` on motion: metric, pictures, reference, mean."""
    for name in ("change", "flicker"):
        by_side = getattr(motion, name)
        for side in (STUDENT, TEACHER, OTHER):
            yield name, side, "", mean_of(by_side[side], prompts)
        for side in (STUDENT, OTHER):
            ratio = ratio_of_means(by_side[side], by_side[TEACHER], prompts)
            yield f"{name}_ratio", side, TEACHER, ratio


def _frame(clip: np.ndarray, number: int) -> np.ndarray:
    return clip[number].astype(np.float64)


def _mean_over_frames(count: int, change: Callable[[int], np.ndarray]) -> float:
    """The mean absolute value over so many frames, one after the other; 0 of none."""
    return float(np.mean([np.abs(change(t)).mean() for t in range(count)])) if count > 0 else 0.0
