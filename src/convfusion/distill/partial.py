"""Replace a part of the sites: every n-th, a few, or those that are cheapest to replace.

What a site costs is how well its block imitates its attention after stage 1 of Grafting
(Chandrasegaran et al., arXiv 2506.05340): each block trains alone on the teacher's own inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from convfusion.data.latents import LatentDataset, TrainingData, prepare_data
from convfusion.distill.config import DistillConfig
from convfusion.distill.run import distill
from convfusion.distill.task import DistillTask
from convfusion.distill.trainer import OnStep
from convfusion.distill.validation import noised
from convfusion.errors import ConvFusionError
from convfusion.evaluate import predictions, relative_error
from convfusion.families import denoiser_of
from convfusion.families.conditioning import place_conditioning
from convfusion.files import few
from convfusion.surgery import attention_back, mixers_of

OnProgress = Callable[[int, int], None]
Ranking = Literal["imitation", "epsilon"]


@dataclass(frozen=True)
class SiteCost:
    """What it costs to replace one site.

    Attributes:
        path: of the site.
        imitation_error: E‖b(x) − a(x)‖²/Var a(x) of its block b against its attention a.
        epsilon_error: mean ‖ε̂ − ε̃‖²/‖ε̃‖² of the model with this site alone replaced.
    """

    path: str
    imitation_error: float
    epsilon_error: float


@dataclass(frozen=True)
class SiteCosts:
    """The cost of every site, in the order of the model.

    Attributes:
        sites: one per converted site.
        training: how the blocks were trained; its batch size and seed are those of the measurement.
        samples: held out, that it was measured on.
    """

    sites: tuple[SiteCost, ...]
    training: DistillConfig
    samples: int

    def cheapest(self, by: Ranking = "epsilon") -> list[str]:
        """Paths, the site with the least error first."""
        check_ranking(by)
        return [s.path for s in sorted(self.sites, key=lambda s: getattr(s, f"{by}_error"))]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, between the two errors; None where one of them ranks nothing."""
        return spearman(
            [site.imitation_error for site in self.sites],
            [site.epsilon_error for site in self.sites],
        )


@dataclass(frozen=True)
class Point:
    """The model with a site and all before it replaced.

    Attributes:
        site: the one that was replaced last.
        epsilon_error: mean ‖ε̂ − ε̃‖²/‖ε̃‖².
        flops_gone: operations saved over those of all attentions that the config would convert.
    """

    site: str
    epsilon_error: float
    flops_gone: float


def check_ranking(by: str) -> Ranking:
    """What sites rank by; a ConvFusionError for anything else."""
    for ranking in get_args(Ranking):
        if by == ranking:
            return ranking
    raise ConvFusionError(f"sites rank by {' or '.join(get_args(Ranking))}, not {by!r}")


def site_costs(
    pipe: Any,
    data: LatentDataset | TrainingData,
    held_out: LatentDataset | TrainingData,
    config: DistillConfig,
    *,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> SiteCosts:
    """Train every block alone to imitate its attention, and measure what each site costs.

    The blocks are trained in place, and are left so.

    Args:
        pipe: converted, with its attention kept.
        data: what to train on.
        held_out: other samples, which the errors are measured on, at ten timesteps each with noise
            of its own; see `hold_out`.
        config: every step is one of stage 1, whatever its `imitation_steps`.
        on_step: as for `distill`.
        on_progress: called with the passes over the held-out samples that are done, and all.

    Raises:
        ConvFusionError: the model is not converted, its attention was dropped, nothing is held out,
            or the training failed.
    """
    training = replace(config, imitation_steps=config.steps)
    task = DistillTask(denoiser_of(pipe), pipe.scheduler)
    apart = ready_to_judge(pipe, held_out)
    if distill(pipe, data, training, on_step=on_step, progress=False).stopped:
        raise KeyboardInterrupt
    imitation = imitation_errors(task, apart, batch_size=config.batch_size, seed=config.seed)
    alone = [frozenset([path]) for path in imitation]
    errors = subset_errors(
        task, apart, alone, batch_size=config.batch_size, seed=config.seed, on_progress=on_progress
    )
    pairs = zip(imitation.items(), errors, strict=True)
    sites = tuple(SiteCost(path, imitated, error) for (path, imitated), error in pairs)
    return SiteCosts(sites, training, sum(map(len, apart.groups)))


@torch.no_grad()
def imitation_errors(
    task: DistillTask, held_out: TrainingData, *, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """E‖b(x) − a(x)‖²/Var a(x) by site, both over all samples, timesteps, tokens and channels."""
    sums: dict[str, Tensor] = {}
    device = task.student.device
    for latents, noises, conditioning in noised(held_out, batch_size, seed):
        told = place_conditioning(conditioning, task.student)
        for t, noise in noises.items():
            steps = torch.full((len(latents),), t, device=device)
            pairs = task.alone(latents.to(device), noise.to(device), steps, told)
            for path, (learned, taught) in pairs.items():
                target = taught.double()
                error = (learned.double() - target).square().mean()
                row = torch.stack(
                    [error, target.mean(), target.square().mean(), error.new_ones(())]
                )
                sums[path] = sums.get(path, 0) + taught.numel() * row.cpu()
    errors = {}
    for path, total in sums.items():
        error, mean, square = (total[:3] / total[3]).tolist()
        errors[path] = error / max(square - mean**2, 1e-12)
        check_finite(errors[path], f"the imitation error of the block at {path}")
    return errors


@torch.no_grad()
def subset_errors(
    task: DistillTask,
    held_out: TrainingData,
    subsets: Sequence[frozenset[str]],
    *,
    batch_size: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Mean ‖ε̂ − ε̃‖²/‖ε̃‖² with the sites of each subset replaced, and no others.

    On equal samples and noises; with all sites it is `held_out_error`.
    """
    paths = mixers_of(task.student).keys()
    errors: list[list[Tensor]] = [[] for _ in subsets]
    total = len(subsets) * sum(-(-len(group) // batch_size) for group in held_out.groups)
    done = 0
    for latents, noises, conditioning in noised(held_out, batch_size, seed):
        told = place_conditioning(conditioning, task.student)
        taught = predictions(task.teacher, task.schedule, latents, noises, told)
        for subset, batch_errors in zip(subsets, errors, strict=True):
            with attention_back(task.student, paths - subset):
                learned = predictions(task.student, task.schedule, latents, noises, told)
            pairs = zip(learned, taught, strict=True)
            batch_errors.append(torch.stack([relative_error(*pair) for pair in pairs]).flatten())
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    means = [torch.cat(batch_errors).mean().item() for batch_errors in errors]
    for subset, mean in zip(subsets, means, strict=True):
        check_finite(mean, f"the ε-error with {few(subset)} replaced")
    return means


def check_finite(error: float, what: str) -> None:
    """Raise a ConvFusionError for an error that sites cannot be ranked by."""
    if not math.isfinite(error):
        raise ConvFusionError(
            f"{what} is not finite, so that sites cannot be ranked: try a lower learning rate or "
            "another autocast"
        )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None if one has a single rank."""
    ranks = []
    for values in (np.asarray(first), np.asarray(second)):
        above = (values[:, None] > values).sum(axis=1)
        ranks.append(above + (values[:, None] == values).sum(axis=1) / 2)
    if min(np.ptp(rank) for rank in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def ready_to_judge(pipe: Any, held_out: LatentDataset | TrainingData) -> TrainingData:
    """Held-out samples, with their captions encoded.

    Raises:
        ConvFusionError: there are none.
    """
    apart = prepare_data(pipe, held_out)
    if not any(map(len, apart.groups)):
        raise ConvFusionError("there are no samples held out to judge by")
    return apart
