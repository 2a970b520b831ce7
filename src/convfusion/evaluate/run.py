"""A whole evaluation: check, draw, look, measure, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from convfusion.clips import check_frames
from convfusion.errors import ConvFusionError
from convfusion.evaluate import measure
from convfusion.evaluate.clip import Clip
from convfusion.evaluate.drawing import (
    RECORDS,
    SIDES,
    STUDENT,
    check_place,
    draw_pictures,
    read_rank,
)
from convfusion.evaluate.extractors import Extractor, Features
from convfusion.evaluate.images import SSIM_SIDE
from convfusion.evaluate.measure import REAL
from convfusion.evaluate.motion import measure_motion
from convfusion.evaluate.pair import teacher_denoiser
from convfusion.evaluate.real import RealClips, RealPictures
from convfusion.evaluate.results import Evaluation
from convfusion.evaluate.settings import EvaluationSettings, identify_pictures, size_of
from convfusion.families import check_captioned, denoiser_of, family_of
from convfusion.families.calls import check_call
from convfusion.folders import locked, remove_remains
from convfusion.generate import check_guidance, check_size, check_steps
from convfusion.imports import check_installed
from convfusion.schedule import is_flow, noise_schedule

Progress = Callable[[str, int], None]


def evaluate(
    pipe: Any,
    settings: EvaluationSettings,
    out: str | Path,
    *,
    extractor: Extractor,
    teacher: Any = None,
    real: RealPictures | RealClips | None = None,
    clip: Clip | None = None,
    names: tuple[str, str] = ("student", "its own attention"),
    on_progress: Progress = lambda stage, done: None,
) -> Evaluation | None:
    """Draw with student and teacher, and compare what they draw. A killed run goes on.

    Args:
        pipe: the student's pipeline.
        settings: prompts, seeds and how to draw them.
        out: folder for pictures and results: new, empty, or begun with the same settings.
        extractor: of the features that distances rest on.
        teacher: another pipeline, or None for the attention that the student's blocks replaced.
        real: pictures to compare with as well; clips where clips are drawn.
        clip: for the CLIP score.
        names: of student and teacher, in the report.
        on_progress: called with the stage of the work and the samples done.

    Returns:
        What was found, also written to `out`; None in every process of a launcher but the first.

    Raises:
        ConvFusionError: something does not fit, or another process writes there. Nothing is drawn.
    """
    folder, reference = Path(out), teacher_denoiser(pipe, teacher)
    identity = _check_possible(pipe, reference, settings, folder, real)
    main = read_rank()[0] == 0  # of the processes of a launcher, which share the folder
    with _writing_alone(folder) if main else nullcontext():
        texts = clip.embed_texts(list(settings.prompts)) if clip and main else None
        count = partial(on_progress, "drawing")
        records = draw_pictures(pipe, reference, settings, folder, identity, on_progress=count)
        if records is None:
            return None
        on_progress("measuring", len(settings))
        seen = measure.extract_features(extractor, folder, settings)
        if real is not None:
            seen[REAL] = _look_at_real(extractor, real)
        clips = {}
        if clip is not None and texts is not None:
            clips = measure.score_with_clip(clip, folder, settings, texts)
        network = _describe_network(extractor)
        about: dict[str, Any] = {"student": names[0], "teacher": names[1]}
        about |= {
            "settings": _describe_settings(pipe, settings),
            "model": {key: value for key, value in identity.items() if key != "settings"},
            "extractor": network | {"features": seen[STUDENT].features.shape[1]},
            "clip": _describe_network(clip.images) if clip else None,
            "real": _describe_real(real, seen[REAL]) if real else None,
        }
        evaluation = _sum_up(about, settings, folder, records, seen, clips)
        write_results(evaluation, folder)
    return evaluation


@contextmanager
def _writing_alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, without what killed runs left in it."""
    with locked(folder):
        remove_remains(folder, *(folder / name for name in (*SIDES, RECORDS)))
        yield


def _check_possible(
    pipe: Any,
    reference: Any,
    settings: EvaluationSettings,
    folder: Path,
    real: RealPictures | RealClips | None,
) -> dict[str, Any]:
    """Everything that can be known before a picture is drawn; what the pictures rest on."""
    check_installed("torchmetrics", "matplotlib", extra="eval")
    check_settings(pipe, settings)
    identity = identify_pictures(pipe, reference, settings)
    check_place(folder, identity)
    if real is not None:
        if isinstance(real, RealClips) != (settings.frames is not None):
            raise ConvFusionError(
                "pictures are compared with real pictures (`open_real`), and clips with real clips "
                "(`open_real_clips`)"
            )
        check_real(real)
    return identity


def _look_at_real(extractor: Extractor, real: RealPictures | RealClips) -> Features:
    if isinstance(real, RealClips):
        return measure.look_at_clips(extractor, real, real.frames)
    return extractor(real)


def _sum_up(
    about: dict[str, Any],
    settings: EvaluationSettings,
    folder: Path,
    records: list[dict[str, Any]],
    seen: dict[str, Features],
    clips: dict[str, Any],
) -> Evaluation:
    """An evaluation from all that was drawn and seen; `about` has its other fields."""
    return Evaluation(
        **about,
        samples=measure.compare_samples(folder, settings, records, seen),
        curves=measure.average_curves(settings, records),
        distributions=measure.compare_sets(seen, settings.prompts),
        scores=measure.score_sets(seen, clips, settings.prompts),
        motion=None if settings.frames is None else measure_motion(folder, settings),
    )


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Write `report.html` and what `Evaluation.save` does."""
    from convfusion.evaluate.page import write_page  # with matplotlib

    evaluation.save(folder)
    write_page(evaluation, folder)


def check_settings(pipe: Any, settings: EvaluationSettings) -> None:
    """Raise a ConvFusionError unless a pipeline can draw this."""
    check_captioned(pipe)
    clips = settings.frames is not None
    check_call(pipe, list(settings.prompts), settings.size, {}, clips=clips)
    if settings.frames is not None:
        check_frames(pipe, settings.frames)
    size = size_of(pipe, settings)
    check_steps(pipe, settings.steps)
    count = len(noise_schedule(pipe.scheduler, denoiser_of(pipe)))
    if max(settings.timesteps) >= count:
        raise ConvFusionError(
            f"the timestep {max(settings.timesteps)} is beyond the last, {count - 1}"
        )
    family = family_of(denoiser_of(pipe))
    family.check_prompts(pipe, settings.prompts)
    check_guidance(pipe, settings.guidance)
    check_size(pipe, size)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and size[0] * size[1] > most:
        raise ConvFusionError(
            f"pictures of {size[1]}×{size[0]} are too large: {most:,} pixels are what Pillow reads"
        )
    if min(size) < SSIM_SIDE:
        raise ConvFusionError(
            f"pictures of {size[1]}×{size[0]} are too small: SSIM needs {SSIM_SIDE}×{SSIM_SIDE}"
        )


def check_real(real: RealPictures | RealClips) -> None:
    """Raise a ConvFusionError unless there are two real pictures or clips that can be used."""
    usable = len(list(islice(real, 2)))
    if usable < 2:
        reasons = ", ".join(f"{n}× {reason}" for reason, n in real.skipped.items())
        noun = "clips" if isinstance(real, RealClips) else "pictures"
        raise ConvFusionError(
            f"{usable or 'none'} of the {noun} of {real.spec} can be used, and 2 or more are "
            "needed" + (f" ({reasons})" if reasons else "")
        )


def _describe_settings(pipe: Any, settings: EvaluationSettings) -> dict[str, Any]:
    return {
        "samples": len(settings),
        "prompts": len(set(settings.prompts)),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": list(size_of(pipe, settings)),
        "batch_size": settings.batch_size,
        **({"predicts": "velocity"} if is_flow(pipe.scheduler) else {}),
        **({} if settings.frames is None else _describe_clips(pipe, settings.frames)),
    }


def _describe_clips(pipe: Any, frames: int) -> dict[str, Any]:
    return {"frames": frames, "frame_rate": family_of(denoiser_of(pipe)).frame_rate}


def _describe_network(extractor: Extractor) -> dict[str, Any]:
    side = extractor.preprocessing.side
    return {"name": extractor.name, "weights": extractor.weights, "side": side}


def _describe_real(real: RealPictures | RealClips, seen: Features) -> dict[str, Any]:
    return {"name": real.spec, "samples": len(seen.features), "skipped": dict(real.skipped)}
