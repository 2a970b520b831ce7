"""Distances and scores of sets of pictures, from their features. All arithmetic is in float64.

A set is [n, d] features, one row for each picture. How large a distance between two sets of one
distribution is depends on n: compare numbers of equal n only, and with what the teacher itself
has at other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convfusion.errors import ConvFusionError

ROWS = 1024  # of a matrix of distances that are held at once


class Mean(NamedTuple):
    """A mean of scores.

    Attributes:
        value: of it; None of no scores.
        error: its standard error over prompts; None of a single prompt.
    """

    value: float | None
    error: float | None


def mean_of(values: Sequence[float], prompts: Sequence[str] | None = None) -> Mean:
    """The mean of some scores, with its standard error; arguments as for `standard_error`."""
    mean = float(np.mean(values, dtype=np.float64)) if len(values) else None
    return Mean(mean, standard_error(values, prompts))


def standard_error(values: Sequence[float], prompts: Sequence[str] | None = None) -> float | None:
    """Standard error of the mean of some scores, over prompts; None of fewer than two prompts.

    Pictures of one prompt are alike, so prompts are what was sampled, and not pictures: the error
    is that of a mean over clusters (Liang and Zeger 1986), and of one picture for each prompt the
    usual one.

    Args:
        values: a score for each picture.
        prompts: of each picture; by default each has a prompt of its own.

    Raises:
        ConvFusionError: there is not a prompt for each score.
    """
    groups = _groups(len(values), prompts).numpy()
    count = len(set(groups.tolist()))
    if count < 2:
        return None
    scores = np.asarray(values, np.float64)
    sums = np.bincount(groups, weights=scores - scores.mean())
    return float(np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(scores))


def _groups(count: int, prompts: Sequence[str] | None) -> Tensor:
    """The number of each row's prompt, [n], in the order in which prompts come."""
    if prompts is None:
        return torch.arange(count)
    if len(prompts) != count:
        raise ConvFusionError(f"a prompt is needed for each of {count} rows, not {len(prompts)}")
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return torch.tensor(groups, dtype=torch.long)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features [n, d] and [m, d].

    ‖μ − μ'‖² + tr Σ + tr Σ' − 2·tr (ΣΣ')^½ (Dowson and Landau 1982; on features, Heusel et al.
    2017). With Σ = AᵀA and Σ' = BᵀB the last trace is the sum of the singular values of ABᵀ,
    which needs no root of a matrix and stays right where there are fewer pictures than features.

    Raises:
        ConvFusionError: a set has fewer than two rows, another width, or values not finite.
    """
    one, other = checked(one, other)
    shift = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    roots = [_root(each) for each in (one, other)]
    spread = sum(root.square().sum() for root in roots)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, (shift + spread - 2 * shared).item())


def _root(features: Tensor) -> Tensor:
    """A of at most d rows with AᵀA = Σ, the unbiased covariance of features [n, d]."""
    centred = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


@dataclass(frozen=True, eq=False)
class KernelDistance:
    """A kernel distance, or the difference of two.

    Attributes:
        value: of it.
        left_out: the values without each prompt in turn, a tensor for each set; of paired sets
            one tensor, without each prompt in both.
    """

    value: float
    left_out: tuple[Tensor, ...]

    @property
    def error(self) -> float | None:
        """Standard error by the jackknife (Efron and Stein 1981); None of two prompts.

        Too large, up to about twice, where the sets are of one distribution.
        """
        if any(len(values) < 3 for values in self.left_out):
            return None
        spreads = [(len(values) - 1) * values.var(correction=0) for values in self.left_out]
        return float(torch.stack(spreads).sum().sqrt())

    def __sub__(self, other: KernelDistance) -> KernelDistance:
        """How much further one set is from a reference than another of the same prompts."""
        pairs = zip(self.left_out, other.left_out, strict=True)
        return KernelDistance(self.value - other.value, tuple(a - b for a, b in pairs))


def kernel_distance(
    one: Tensor, other: Tensor, *, paired: bool = False, prompts: Sequence[str] | None = None
) -> KernelDistance:
    """KID: the unbiased squared maximum mean discrepancy under k(x, y) = (x·y/d + 1)³.

    Bińkowski et al. 2018. Unlike the Fréchet distance it has no bias: two sets of one
    distribution have 0 on average, and less than 0 half of the time.

    Args:
        one: features [n, d].
        other: features [m, d].
        paired: rows of one number belong to one prompt, and are left out together where the
            standard error is worked out.
        prompts: of the rows of `one`, and of `other` if they are paired. All rows of a prompt are
            left out together; by default each row has a prompt of its own.

    Raises:
        ConvFusionError: as `frechet_distance`; or paired sets are not of one length, or there is
            not a prompt for each row.
    """
    one, other = checked(one, other)
    n, m = len(one), len(other)
    if paired and n != m:
        raise ConvFusionError(f"paired sets have a row for each prompt, not {n} and {m}")
    groups = _groups(n, prompts)
    others = groups if paired else torch.arange(m)
    own, theirs = _pairs(one, groups), _pairs(other, others)
    across, back = _kernel_sums(one, other), _kernel_sums(other, one)
    rest, rest_other = n - _by_group(torch.ones(n), groups), m - _by_group(torch.ones(m), others)
    total = across.sum()
    value = _discrepancy(own.all, theirs.all, total, torch.tensor(n), torch.tensor(m)).item()
    if paired:
        shared = _by_group(across + back, groups) - _within(one, other, groups)
        rest_value = _discrepancy(own.rest, theirs.rest, total - shared, rest, rest_other)
        return KernelDistance(value, (rest_value,))
    left, right = total - _by_group(across, groups), total - _by_group(back, others)
    without_one = _discrepancy(own.rest, theirs.all, left, rest, torch.tensor(m))
    without_other = _discrepancy(own.all, theirs.rest, right, torch.tensor(n), rest_other)
    return KernelDistance(value, (without_one, without_other))


def _discrepancy(own: Tensor, theirs: Tensor, across: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """The distance, from sums over pairs of n rows, of m rows, and of both."""
    pairs, others = ((count * (count - 1)).clamp(min=1) for count in (n, m))
    return own / pairs + theirs / others - 2 * across / (n * m)


class _Pairs(NamedTuple):
    """Σ k(x_i, x_j) over i ≠ j: of all rows, and of those that are left without each group."""

    all: Tensor
    rest: Tensor


def _pairs(features: Tensor, groups: Tensor) -> _Pairs:
    itself = _kernel(features, features)  # no row is compared with itself
    sums = _kernel_sums(features, features) - itself
    inside = _within(features, features, groups) - _by_group(itself, groups)
    return _Pairs(sums.sum(), sums.sum() - 2 * _by_group(sums, groups) + inside)


def _by_group(values: Tensor, groups: Tensor) -> Tensor:
    """Sums of values [n] by group, [G]."""
    total = values.new_zeros(int(groups.max()) + 1, dtype=torch.float64)
    return total.index_add(0, groups, values.double())


def _within(one: Tensor, other: Tensor, groups: Tensor) -> Tensor:
    """Σ k(x_i, y_j) over the pairs of each group, [G]."""
    if int(groups.max()) + 1 == len(groups):
        return _kernel(one, other)
    rows: list[list[int]] = [[] for _ in range(int(groups.max()) + 1)]
    for row, group in enumerate(groups.tolist()):
        rows[group].append(row)
    return torch.stack([_kernel_sums(one[part], other[part]).sum() for part in rows])


def _kernel_sums(one: Tensor, other: Tensor) -> Tensor:
    """Σ_j k(x_i, y_j), [n]."""
    width = one.shape[1]
    return torch.cat([((p @ other.T / width + 1) ** 3).sum(dim=1) for p in one.split(ROWS)])


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """k(x_i, y_i), [n]."""
    return ((one * other).mean(dim=1) + 1) ** 3


@dataclass(frozen=True)
class Neighbourhoods:
    """How a set of pictures lies in another one.

    Attributes:
        precision: share of the pictures that lie within the reference (Kynkäänniemi et al. 2019).
        recall: share of the reference that lies within the pictures.
        density: how many balls of the reference a picture lies in, over k (Naeem et al. 2020);
            1 on average for one distribution, and not bounded by it.
        coverage: share of the reference's balls that hold a picture; 1 − 2^(−k) or so for one
            distribution.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(
    pictures: Tensor, reference: Tensor, *, k: int = 3, k_density: int = 5
) -> Neighbourhoods:
    """Precision, recall, density and coverage of features [n, d] against a reference [m, d].

    A set is taken for the union of the balls round its points, each of the radius of its k-th
    nearest neighbour in the set (itself not counted).

    Args:
        pictures: what is judged.
        reference: what it is judged by.
        k: neighbours for precision and recall.
        k_density: neighbours for density and coverage.

    Raises:
        ConvFusionError: a set has no more rows than there are neighbours to find.
    """
    pictures, reference = checked(pictures, reference)
    most = max(k, k_density)
    if min(len(pictures), len(reference)) <= most:
        raise ConvFusionError(
            f"{min(len(pictures), len(reference))} pictures have no {most} nearest neighbours: "
            f"at least {most + 1} are needed"
        )
    own, wide = _radii(reference, (k, k_density))
    (theirs,) = _radii(pictures, (k,))
    inside = hits = 0
    covered = torch.zeros(len(reference), dtype=torch.bool)
    reached = torch.zeros(len(reference), dtype=torch.bool)
    for part in pictures.split(ROWS):
        apart = torch.cdist(part, reference)
        inside += int((apart <= own).any(dim=1).sum())
        hits += int((apart <= wide).sum())
        covered |= (apart <= wide).any(dim=0)
    for start, part in zip(range(0, len(reference), ROWS), reference.split(ROWS), strict=True):
        reached[start : start + ROWS] = (torch.cdist(part, pictures) <= theirs).any(dim=1)
    return Neighbourhoods(
        precision=inside / len(pictures),
        recall=reached.double().mean().item(),
        density=hits / (k_density * len(pictures)),
        coverage=covered.double().mean().item(),
    )


def _radii(features: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    """For each count k, the distance [n] of every row of [n, d] to its k-th nearest other row."""
    nearest = []
    for start, part in zip(range(0, len(features), ROWS), features.split(ROWS), strict=True):
        apart = torch.cdist(part, features)
        own = torch.arange(len(part))
        apart[own, start + own] = torch.inf  # a row is no neighbour of itself; its twin is
        nearest.append(apart.topk(max(counts), largest=False).values)
    radii = torch.cat(nearest) * (1 + 1e-9)  # a ball holds, despite rounding, what it ends at
    return [radii[:, k - 1] for k in counts]


def inception_score(logits: Tensor) -> float:
    """exp of the mean of KL(p(y|x) ‖ p(y)) over class logits [n, classes] (Salimans et al. 2016).

    On Inception's logits it is the inception score; on those of a DINOv2 head, the DINO score. It
    lies between 1 and the number of classes, grows with n, and knows nothing of a reference.
    """
    told = checked(logits)[0].log_softmax(dim=1)
    overall = told.logsumexp(dim=0) - math.log(len(told))
    return (told.exp() * (told - overall)).sum(dim=1).mean().exp().item()


def clip_scores(pictures: Tensor, texts: Tensor) -> Tensor:
    """100·max(cos, 0) of each picture's embedding with its text's (Hessel et al. 2021); [n]."""
    cosine = torch.cosine_similarity(pictures.double(), texts.double(), dim=1)
    return 100 * cosine.clamp(min=0)


def checked(*sets: Tensor) -> list[Tensor]:
    """Features in float64 on the CPU, after a look at their shapes and values.

    Raises:
        ConvFusionError: a set is no [n, d] with n ≥ 2, is of another d, or is not finite.
    """
    for each in sets:
        if each.ndim != 2 or len(each) < 2:
            raise ConvFusionError(
                f"features must be [n, d] of two pictures or more, not {list(each.shape)}"
            )
        if each.shape[1] != sets[0].shape[1]:
            raise ConvFusionError(
                f"features of {each.shape[1]} and {sets[0].shape[1]} numbers cannot be compared"
            )
        if not each.isfinite().all():
            raise ConvFusionError("some features are not finite: is a picture's network in fp16?")
    return [each.detach().cpu().double() for each in sets]
