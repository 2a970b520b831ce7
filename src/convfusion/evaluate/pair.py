"""Whom a student is compared with: its own attention, or another pipeline that is its twin."""

from __future__ import annotations

from typing import Any

from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, denoiser_of
from convfusion.fingerprint import differences, identity
from convfusion.schedule import noise_schedule
from convfusion.surgery import attention_teacher, mixers_of, status


def teacher_denoiser(pipe: Any, teacher: Any = None) -> Denoiser:
    """The denoiser that a student is compared with.

    Args:
        pipe: the student's pipeline.
        teacher: another pipeline, or None for the student's own attention.

    Raises:
        ConvFusionError: the student has no attention of its own to compare with, its noise
            schedule is not supported, or the other pipeline is no twin.
    """
    noise_schedule(pipe.scheduler, denoiser_of(pipe))
    if teacher is not None:
        check_twins(pipe, teacher)
        return denoiser_of(teacher).eval()
    student = denoiser_of(pipe)
    if not mixers_of(student):
        raise ConvFusionError(
            "this model is not converted, so there is nothing to compare: give trained blocks, or "
            "another pipeline as its teacher"
        )
    if not all(site.attention_kept for site in status(student).sites):
        raise ConvFusionError(
            "the attention of this model was dropped: give the original pipeline as its teacher"
        )
    return attention_teacher(student)


def check_twins(pipe: Any, teacher: Any) -> None:
    """Raise a ConvFusionError unless two pipelines differ in their denoisers alone.

    Else pictures from equal seeds, and latents, would not be comparable.
    """
    kinds = [type(each).__name__ for each in (pipe, teacher)]
    if kinds[0] != kinds[1]:
        raise ConvFusionError(f"a {kinds[0]} cannot be compared with a {kinds[1]} as its teacher")
    one, other = denoiser_of(pipe), denoiser_of(teacher)
    for name, words in (("in_channels", "latent channels"), ("sample_size", "latent size")):
        if one.config.get(name) != other.config.get(name):
            raise ConvFusionError(
                f"this is not its teacher's twin: its {words} {one.config.get(name)}, and the "
                f"teacher's {other.config.get(name)}"
            )
    where = ("in the teacher", "here")
    if other_parts := differences(identity(teacher), identity(pipe), where):
        raise ConvFusionError(
            f"this is not its teacher's twin: another {', another '.join(other_parts)}"
        )
    own, others = (noise_schedule(p.scheduler, denoiser_of(p)) for p in (pipe, teacher))
    if not own.is_same(others):
        raise ConvFusionError("this is not its teacher's twin: the two have other noise schedules")
