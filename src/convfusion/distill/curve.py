"""Quality against the number of sites that are replaced."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convfusion.data.latents import LatentDataset, TrainingData
from convfusion.distill.partial import (
    OnProgress,
    Point,
    Ranking,
    SiteCosts,
    ready_to_judge,
    subset_errors,
)
from convfusion.distill.task import DistillTask
from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of
from convfusion.files import write_csv, write_picture, write_text
from convfusion.fingerprint import fingerprint
from convfusion.mixers import Grid
from convfusion.operations import site_operations
from convfusion.surgery import mixers_of
from convfusion.surgery.config import ConvertConfig, select_sites

CSV_COLUMNS = ("order", "sites", "site", "imitation_error", "epsilon_error", "flops_gone")


@dataclass(frozen=True)
class ReplacementCurve:
    """Quality against the number of sites, in three orders; k sites are at place k − 1.

    Attributes:
        costs: which the sites are ordered by.
        config: the conversion of all sites.
        by_imitation: the site with the least imitation error first.
        dearest: the other way round.
        by_epsilon: the site with the least ε-error alone first.
        latents: (height, width), or (frames, height, width), that operations were counted for.
        teacher: fingerprint of the stock denoiser.
    """

    costs: SiteCosts
    config: ConvertConfig
    by_imitation: tuple[Point, ...]
    dearest: tuple[Point, ...]
    by_epsilon: tuple[Point, ...]
    latents: Grid
    teacher: str

    @property
    def orders(self) -> dict[str, tuple[Point, ...]]:
        """The three by name."""
        return {name: getattr(self, name) for name in ("by_imitation", "dearest", "by_epsilon")}

    def cheapest_config(self, k: int, by: Ranking = "epsilon") -> ConvertConfig:
        """The conversion of the k cheapest sites."""
        chosen_counts(len(self.costs.sites), [k])
        return select_sites(self.config, self.costs.cheapest(by)[:k])

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "schema": "convfusion-curve-1",
            "teacher": self.teacher,
            "samples": self.costs.samples,
            "latents": list(self.latents),
            "training": self.costs.training.to_dict(),
            "convert": self.config.to_dict(),
            "rank_correlation": self.costs.rank_correlation,
            "sites": [asdict(site) for site in self.costs.sites],
            **{name: [asdict(p) for p in points] for name, points in self.orders.items()},
        }

    def save(
        self,
        folder: str | Path,
        counts: Sequence[int] | None = None,
        by: Ranking = "epsilon",
    ) -> list[Path]:
        """Write `curve.json`, `curve.csv`, `curve.png` (needs matplotlib) and config files.

        Args:
            folder: made if need be.
            counts: k of each `cheapest-KK.json`; see `chosen_counts`.
            by: which error the sites of these rank by.

        Returns:
            The config files.
        """
        from convfusion.distill.plots import draw_curve
        from convfusion.report import render_figure

        folder, counts = Path(folder), chosen_counts(len(self.costs.sites), counts)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "curve.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_csv(folder / "curve.csv", CSV_COLUMNS, self._rows())
        figure = draw_curve(self.costs, self.orders)
        write_picture(folder / "curve.png", render_figure(figure), optimize=True)
        files = [folder / f"cheapest-{k:02d}.json" for k in counts]
        for k, file in zip(counts, files, strict=True):
            self.cheapest_config(k, by).save(file)
        return files

    def _rows(self) -> Iterator[dict[str, Any]]:
        """What `curve.csv` has of each order, site by site."""
        imitation = {site.path: site.imitation_error for site in self.costs.sites}
        for name, points in self.orders.items():
            for count, point in enumerate(points, 1):
                values = (imitation[point.site], point.epsilon_error, point.flops_gone)
                numbers = (f"{value:.6g}" for value in values)
                yield dict(zip(CSV_COLUMNS, (name, count, point.site, *numbers), strict=True))


def replacement_curve(
    pipe: Any,
    held_out: LatentDataset | TrainingData,
    costs: SiteCosts,
    *,
    on_progress: OnProgress | None = None,
) -> ReplacementCurve:
    """The ε-error with 1, 2, … and all sites replaced by the blocks as they are.

    Args:
        pipe: as `site_costs` left it.
        held_out: the samples of `site_costs`.
        costs: of its sites.
        on_progress: as for `site_costs`.

    Raises:
        ConvFusionError: the costs are of other sites, or nothing is held out.
    """
    model = denoiser_of(pipe)
    mixers = mixers_of(model)
    if {site.path for site in costs.sites} != mixers.keys():
        raise ConvFusionError("these costs are not those of this model's converted sites")
    task = DistillTask(model, pipe.scheduler)
    apart = ready_to_judge(pipe, held_out)
    ranked = costs.cheapest("imitation")
    orders = (ranked, ranked[::-1], costs.cheapest("epsilon"))
    prefixes = [frozenset(order[: k + 1]) for order in orders for k in range(len(order))]
    subsets = list(dict.fromkeys(prefixes))
    size, seed = costs.training.batch_size, costs.training.seed
    measured = subset_errors(
        task, apart, subsets, batch_size=size, seed=seed, on_progress=on_progress
    )
    errors = dict(zip(subsets, measured, strict=True))
    latents = tuple(apart.take(apart.groups[0][:1], [False])[0].shape[2:])
    flops = site_operations(model, latents)
    whole = sum(attention for attention, _ in flops.values())

    def points(order: list[str]) -> tuple[Point, ...]:
        rows = []
        for k, path in enumerate(order, 1):
            saved = sum(flops[each][0] - flops[each][1] for each in order[:k])
            rows.append(Point(path, errors[frozenset(order[:k])], saved / whole))
        return tuple(rows)

    return ReplacementCurve(
        costs=costs,
        config=ConvertConfig({glob.escape(path): mixer.config for path, mixer in mixers.items()}),
        by_imitation=points(orders[0]),
        dearest=points(orders[1]),
        by_epsilon=points(orders[2]),
        latents=latents,
        teacher=fingerprint(task.teacher),
    )


def chosen_counts(total: int, counts: Sequence[int] | None) -> list[int]:
    """Numbers of sites to write configs for: those given, or a quarter, a half, three quarters.

    Raises:
        ConvFusionError: there are not so many sites.
    """
    if counts is None:
        counts = [max(1, round(total * share)) for share in (0.25, 0.5, 0.75)]
    if wrong := [k for k in counts if not 1 <= k <= total]:
        raise ConvFusionError(f"{wrong[0]} sites cannot be chosen: there are {total}")
    return sorted(set(counts))
