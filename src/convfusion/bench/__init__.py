"""What a model's self-attention costs, and what stands in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convfusion.imports import lazy

if TYPE_CHECKING:
    from convfusion.bench.counts import (
        Cost,
        add_totals,
        list_contenders,
        operation_table,
        write_costs,
    )
    from convfusion.bench.models import BenchModel, bench_model

_HOME = {
    "Cost": "counts",
    "list_contenders": "counts",
    "operation_table": "counts",
    "add_totals": "counts",
    "write_costs": "counts",
    "BenchModel": "models",
    "bench_model": "models",
}
__all__ = sorted(_HOME)

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
