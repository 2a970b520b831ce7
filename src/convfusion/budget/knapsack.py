"""One option for every item, so that the sum of errors is least for each sum of costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MOST = 2048  # sums that are kept after each item; fewer are exact
LEAST = 1e-6  # of the largest cost: what costs less lies in one bucket

Numbers = NDArray[np.float64]
Options = Sequence[tuple[float, float]]  # (cost, error) of each


@dataclass(frozen=True)
class Front:
    """The best choices, the cheapest first: none is both dearer and worse than another one.

    Attributes:
        costs: [P], rising.
        errors: [P], falling.
        picks: [P, S], the option of each of S items.
    """

    costs: Numbers
    errors: Numbers
    picks: NDArray[np.int64]

    def within(self, budget: float) -> int | None:
        """The place of the best choice whose cost is at most the budget; None if there is none."""
        place = int(np.searchsorted(self.costs, budget, side="right")) - 1
        return None if place < 0 else place


def find_front(options: Sequence[Options], most: int = MOST) -> Front:
    """All best choices of one option per item, by their costs: a knapsack of every size at once.

    A dynamic programme: each item in turn is added to the best choices so far, and what another
    choice beats is left out. Where more than `most` remain, the range of costs is cut into as many
    buckets of equal ratio, and the best choice of each stays. Costs are never rounded, so that a
    budget always holds; and the front does not depend on it, so that more never gives a worse
    choice. What a greedy choice finds is among them.

    Args:
        options: of each item, at least one, with costs of 0 or more.
        most: choices that are kept.
    """
    front = Front(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int64))
    for item in options:
        front = _thin(_add_item(front, item), most)
    costs, errors, picks = _greedy_path(options)
    return _undominated(
        np.concatenate([front.costs, costs]),
        np.concatenate([front.errors, errors]),
        np.concatenate([front.picks, picks]),
    )


def list_undominated(options: Options) -> list[int]:
    """Which options no other one beats in cost and error, the cheapest first."""
    costs, errors = (np.array(values, float) for values in zip(*options, strict=True))
    return _places(costs, errors).tolist()


def _add_item(front: Front, item: Options) -> Front:
    costs, errors = (np.array(values, float) for values in zip(*item, strict=True))
    all_costs = (front.costs[:, None] + costs).ravel()
    all_errors = (front.errors[:, None] + errors).ravel()
    places = _places(all_costs, all_errors)
    before, own = np.divmod(places, len(costs))
    picks = np.concatenate([front.picks[before], own[:, None]], axis=1)
    return Front(all_costs[places], all_errors[places], picks)


def _places(costs: Numbers, errors: Numbers) -> NDArray[np.int64]:
    order = np.argsort(costs)
    best = np.minimum.accumulate(errors[order])
    order = order[np.concatenate([[True], best[1:] < best[:-1]])]
    last = np.diff(costs[order]) > 0  # of equal costs, the last has the least error
    return order[np.concatenate([last, [True]])]


def _undominated(costs: Numbers, errors: Numbers, picks: NDArray[np.int64]) -> Front:
    places = _places(costs, errors)
    return Front(costs[places], errors[places], picks[places])


def _thin(front: Front, most: int) -> Front:
    if len(front.costs) <= most:
        return front
    scale = np.log(np.maximum(front.costs, LEAST * front.costs[-1]))
    bucket = np.floor((scale - scale[0]) / (scale[-1] - scale[0]) * (most - 1))
    kept = np.concatenate([bucket[1:] != bucket[:-1], [True]])  # the last of each is its best
    kept[0] = True  # without the cheapest, a small budget could not be met
    return Front(front.costs[kept], front.errors[kept], front.picks[kept])


def _greedy_path(options: Sequence[Options]) -> tuple[Numbers, Numbers, NDArray[np.int64]]:
    """Choices from the cheapest on, each time the step that takes away most error for its cost."""
    picks = np.zeros(len(options), np.int64)
    cost = error = 0.0
    steps: list[tuple[float, int, int]] = []  # error gained per cost, item, its next option
    for item, each in enumerate(options):
        corners = _list_corners(each)
        picks[item] = corners[0]
        cost, error = cost + each[corners[0]][0], error + each[corners[0]][1]
        for before, after in pairwise(corners):
            steps.append((_slope(each[before], each[after]), item, after))
    rows = [(cost, error, picks.copy())]
    for _, item, after in sorted(steps, key=lambda step: -step[0]):
        old, new = options[item][picks[item]], options[item][after]
        cost, error = cost + new[0] - old[0], error + new[1] - old[1]
        picks[item] = after
        rows.append((cost, error, picks.copy()))
    costs, errors, paths = zip(*rows, strict=True)
    return np.array(costs), np.array(errors), np.array(paths)


def _slope(cheap: tuple[float, float], dear: tuple[float, float]) -> float:
    return (cheap[1] - dear[1]) / (dear[0] - cheap[0])


def _list_corners(options: Options) -> list[int]:
    """The options on the lower convex hull of errors over costs: each step gains less per cost."""
    corners: list[int] = []
    for place in list_undominated(options):
        while len(corners) > 1 and _slope(options[corners[-2]], options[corners[-1]]) <= _slope(
            options[corners[-1]], options[place]
        ):
            corners.pop()
        corners.append(place)
    return corners
