"""What an evaluation draws: prompts, seeds, settings, and the weights that they rest on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from convfusion.errors import ConvFusionError
from convfusion.evaluate.epsilon import TIMESTEPS
from convfusion.families import Denoiser, denoiser_of, native_size
from convfusion.fingerprint import (
    digest_of_json,
    fingerprint,
    identity,
    module_settings,
    scheduler_identity,
    tensors_fingerprint,
)
from convfusion.generate import check_numbers
from convfusion.surgery import mixers_of


@dataclass(frozen=True)
class EvaluationSettings:
    """What teacher and student draw.

    Attributes:
        prompts: of every sample; class names or numbers for DiT.
        seeds: of every sample's noise.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        size: (height, width) in pixels, or None for the pipeline's own.
        batch_size: samples drawn at once.
        timesteps: where ε-errors are measured, on what the teacher drew.
        frames: of every clip, or None where pictures are drawn.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int = 25
    guidance: float = 5.0
    size: tuple[int, int] | None = None
    batch_size: int = 8
    timesteps: tuple[int, ...] = TIMESTEPS
    frames: int | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds):
            raise ConvFusionError(
                f"there are {len(self.prompts)} prompts and {len(self.seeds)} seeds: one of each "
                "is needed for every sample"
            )
        if len(self.prompts) < 2:
            raise ConvFusionError(f"{len(self.prompts)} samples tell nothing: 2 or more are needed")
        if len(set(zip(self.prompts, self.seeds, strict=True))) < len(self.prompts):
            raise ConvFusionError("a prompt is drawn twice from one seed: give each another seed")
        numbers = (self.steps, self.guidance, self.batch_size)
        check_numbers((*self.seeds, *self.other_seeds), *numbers)
        if not self.timesteps or min(self.timesteps) < 0:
            raise ConvFusionError("timesteps must be 0 or more, and at least one is needed")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def other_seeds(self) -> tuple[int, ...]:
        """Of the teacher's other pictures: none of them is a seed of `seeds`."""
        shift = max(self.seeds) - min(self.seeds) + 1
        return tuple(seed + shift for seed in self.seeds)

    @property
    def batches(self) -> list[range]:
        starts = range(0, len(self), self.batch_size)
        return [range(start, min(start + self.batch_size, len(self))) for start in starts]


def plan_evaluation(
    prompts: list[str], samples: int | None, seed: int, **settings: Any
) -> EvaluationSettings:
    """Samples of some prompts, with seeds that count on from one.

    Args:
        prompts: to draw.
        samples: how many; fewer than prompts take those that are evenly spread over the list, more
            must be a multiple of their number, and None is one of each.
        seed: of the first sample.
        settings: further fields of `EvaluationSettings`.

    Raises:
        ConvFusionError: there are no prompts, or prompts would count unequally.
    """
    if not prompts:
        raise ConvFusionError("there are no prompts to draw: at least one is needed")
    count = len(prompts) if samples is None else samples
    if count > len(prompts) and count % len(prompts):
        near = -(-count // len(prompts)) * len(prompts)
        raise ConvFusionError(
            f"{count} samples of {len(prompts)} prompts would draw some prompts more often: "
            f"give {near} samples, or up to {len(prompts)}"
        )
    if count < len(prompts):
        prompts = spread_evenly(prompts, count)
    chosen = tuple(prompts[i % len(prompts)] for i in range(count))
    return EvaluationSettings(chosen, tuple(range(seed, seed + count)), **settings)


def spread_evenly(prompts: list[str], count: int) -> list[str]:
    """So many of a list, at even distances."""
    return [prompts[int((i + 0.5) * len(prompts) / count)] for i in range(count)]


def size_of(pipe: Any, settings: EvaluationSettings) -> tuple[int, int]:
    """(height, width) of the pictures that are drawn."""
    return settings.size or native_size(pipe)


def identify_pictures(pipe: Any, teacher: Denoiser, settings: EvaluationSettings) -> dict[str, Any]:
    """Everything that the pictures depend on, for JSON."""
    student = denoiser_of(pipe)
    denoisers = {"teacher": teacher, "student": student}
    mixers = mixers_of(student)
    blocks = {path: repr(mixer.config) for path, mixer in mixers.items()}
    values = {  # as a file of blocks names them, so that a model card knows which were measured
        f"{path}.mixer.{name}": tensor
        for path, mixer in mixers.items()
        for name, tensor in mixer.state_dict().items()
    }
    weights = {name: fingerprint(part) for name, part in denoisers.items()}
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights | {"blocks": tensors_fingerprint(values)},
        "rests_on": {name: part for name, part in identity(pipe).items() if part is not None},
        "denoisers": {
            "teacher": module_settings(teacher),
            "student": module_settings(student) | {"blocks": digest_of_json(blocks)},
        },
        "scheduler": scheduler_identity(pipe.scheduler),
        "precision": str(student.dtype).removeprefix("torch."),
        "device": student.device.type,
        "settings": asdict(settings) | {"size": size_of(pipe, settings)},
    }
