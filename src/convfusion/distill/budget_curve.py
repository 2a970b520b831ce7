"""Quality against cost: what the choice within each budget is expected to leave, and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convfusion.budget import Allocation, Budget, Moments, choose_mixers, list_allocations
from convfusion.data.latents import LatentDataset, TrainingData
from convfusion.distill.partial import OnProgress, ready_to_judge
from convfusion.distill.validation import noised
from convfusion.errors import ConvFusionError
from convfusion.evaluate import predictions, relative_error
from convfusion.families import Denoiser, denoiser_of
from convfusion.families.conditioning import place_conditioning
from convfusion.files import write_csv, write_picture
from convfusion.schedule import noise_schedule
from convfusion.surgery import convert, mixers_of, revert, start_from_attention

BUDGETS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)

Calls = Callable[[], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class BudgetPoint:
    """The model as it is chosen within one budget, before any training.

    Attributes:
        choice: `moments`, or `uniform` for equal ranks everywhere.
        budget: times fewer operations that were asked for.
        saving: times fewer operations that it takes.
        replaced: sites without their attention.
        predicted: ε-error by the moments; None of equal ranks.
        expected: the same with the imitation errors of the very blocks that were set.
        measured: mean ‖ε̂ − ε̃‖²/‖ε̃‖² on the samples held out.
    """

    choice: str
    budget: float
    saving: float
    replaced: int
    predicted: float | None
    expected: float
    measured: float


@dataclass(frozen=True)
class BudgetCurve:
    """Points by rising budget, first of the choice by moments, then of equal ranks.

    Attributes:
        points: of both.
        samples: held out, that errors were measured on.
    """

    points: tuple[BudgetPoint, ...]
    samples: int

    def save(self, folder: str | Path) -> list[Path]:
        """Write `budget.csv` and `budget.png` (needs matplotlib) into a folder, made if need be."""
        from convfusion.distill.plots import draw_budgets
        from convfusion.report import render_figure

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns = [each.name for each in fields(BudgetPoint)]
        rows = [
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(point).items()}
            for point in self.points
        ]
        files = [folder / "budget.csv", folder / "budget.png"]
        write_csv(files[0], columns, rows)
        write_picture(files[1], render_figure(draw_budgets(self.points)), optimize=True)
        return files


def budget_curve(
    pipe: Any,
    held_out: LatentDataset | TrainingData,
    moments: Moments,
    calls: Calls,
    *,
    budgets: Sequence[float] = BUDGETS,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> BudgetCurve:
    """Convert within each budget, start from the attention, measure, and revert.

    A budget that cannot be reached with equal ranks, or within which all attention is kept, has no
    point.

    Args:
        pipe: not converted; it is left so.
        held_out: what errors are measured on.
        moments: of the pipeline's denoiser.
        calls: gives the calls of the denoiser that blocks start from, anew each time.
        budgets: times fewer operations.
        batch_size: samples at once.
        seed: of the noises.
        on_progress: called with the budgets that are done, and all.

    Raises:
        ConvFusionError: the pipeline is converted, nothing is held out, or the moments are those
            of another model.
    """
    model = denoiser_of(pipe)
    if mixers_of(model):
        raise ConvFusionError("this model is converted already: revert it before")
    apart = ready_to_judge(pipe, held_out)
    best = list_allocations(model, moments, moments.latents, Budget(budgets[0]))
    ways: dict[str, Callable[[Budget], Allocation]] = {
        "moments": best.within,
        "uniform": lambda budget: choose_mixers(model, budget, size=moments.latents),
    }
    judge = _Judge(pipe, apart, batch_size, seed)
    points, total = [], len(ways) * len(budgets)
    for way, (name, choose) in enumerate(ways.items()):
        for number, ratio in enumerate(sorted(budgets)):
            allocation = _try(choose, Budget(ratio))
            if allocation is not None:
                errors = _measure(model, allocation, moments, calls, judge)
                points.append(
                    BudgetPoint(
                        choice=name,
                        budget=ratio,
                        saving=allocation.saving,
                        replaced=sum(site.mixer is not None for site in allocation.sites),
                        predicted=allocation.epsilon_error,
                        expected=errors[0],
                        measured=errors[1],
                    )
                )
            if on_progress is not None:
                on_progress(way * len(budgets) + number + 1, total)
    return BudgetCurve(tuple(points), sum(map(len, apart.groups)))


def _try(choose: Callable[[Budget], Allocation], budget: Budget) -> Allocation | None:
    try:
        allocation = choose(budget)
        allocation.config()
    except ConvFusionError:
        return None
    return allocation


class _Judge:
    """The ε-error of a denoiser to what it predicted when this was made, on samples held out."""

    def __init__(self, pipe: Any, apart: TrainingData, batch_size: int, seed: int) -> None:
        self.model = denoiser_of(pipe)
        self.schedule = noise_schedule(pipe.scheduler, self.model)
        self.batches = []
        for latents, noises, conditioning in noised(apart, batch_size, seed):
            told = place_conditioning(conditioning, self.model)
            self.batches.append((latents, noises, told, self._predict(latents, noises, told)))

    def _predict(
        self, latents: Tensor, noises: Mapping[int, Tensor], told: dict[str, Any]
    ) -> list[Tensor]:
        return predictions(self.model, self.schedule, latents, noises, told)

    def measure(self) -> float:
        """Mean ‖ε̂ − ε̃‖²/‖ε̃‖² over samples and timesteps."""
        errors = [
            relative_error(*pair)
            for latents, noises, told, taught in self.batches
            for pair in zip(self._predict(latents, noises, told), taught, strict=True)
        ]
        return torch.cat(errors).mean().item()


def _measure(
    model: Denoiser, allocation: Allocation, moments: Moments, calls: Calls, judge: _Judge
) -> tuple[float, float]:
    """The ε-error that the imitation errors let expect, and that of the samples held out."""
    convert(model, allocation.config())
    try:
        return allocation.expect(start_from_attention(model, calls()), moments), judge.measure()
    finally:
        revert(model)
