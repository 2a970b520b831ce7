"""Halo blocks beside the ΔConvBlock and the attention: time and memory on one thread of a CPU.

    python benchmarks/halo.py            measure all, write results/halo_speed.csv
    python benchmarks/halo.py --rounds 1 quicker, and less certain

All contenders of a case take turns, so that what else the machine does meets them alike. The CPU
time of the thread is the figure to compare; the wall-clock time says how busy the machine was.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from convfusion import DeltaConv, Halo
from convfusion.files import write_csv
from convfusion.mixers import halo
from convfusion.mixers.tokens import Grid
from convfusion.operations import peak_bytes

OUT = Path(__file__).parent.parent / "results" / "halo_speed.csv"
BLOCK = "ΔConvBlock K7"
CONTENDERS: dict[str, Any] = {
    BLOCK: DeltaConv(7),
    "halo 1/8–3/8": Halo(key_ratio=1 / 8, value_ratio=3 / 8),
    "halo 1/4–1/2": Halo(),
    "halo 1/2–1/2": Halo(key_ratio=1 / 2, value_ratio=1 / 2),
    "halo 1/4–1/2, block 8, window 16": Halo(8, 16),
    "attention": None,
}
MOST = 64 * 64  # tokens that the attention is timed at
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One shape: channels, heads, and a square grid of so many tokens a side."""

    channels: int
    heads: int
    side: int
    dtype: str = "float32"
    training: bool = False

    @property
    def grid(self) -> Grid:
        return self.side, self.side


SHAPES = ((320, 8, 32), (640, 8, 32), (1280, 8, 16), (320, 8, 64), (320, 8, 128), (320, 8, 256))
CASES = [
    *(Case(*shape) for shape in SHAPES),
    Case(320, 8, 64, "bfloat16"),
    Case(320, 8, 64, training=True),
]


@dataclass(frozen=True)
class Row:
    """One contender of one case.

    Attributes:
        channels, heads, side, batch, dtype, training: the case; training is forward and backward.
        contender: what was timed.
        cpu_ms, cpu_least_ms: CPU time of a call, median and least of the rounds.
        wall_ms, wall_least_ms: wall-clock time.
        over_block: `cpu_ms` over that of the ΔConvBlock in the same case.
        rounds: counted ones.
        peak_mib: of the tensors of a forward pass at once; in training, of what it keeps for the
            backward pass.
    """

    channels: int
    heads: int
    side: int
    batch: int
    dtype: str
    training: bool
    contender: str
    cpu_ms: float
    cpu_least_ms: float
    wall_ms: float
    wall_least_ms: float
    over_block: float
    rounds: int
    peak_mib: float


def build(settings: Any, case: Case) -> nn.Module:
    """A contender with random weights."""
    torch.manual_seed(0)
    if settings is None:
        size = case.channels // case.heads
        module: nn.Module = Attention(case.channels, heads=case.heads, dim_head=size)
    else:
        module = settings.build(case.channels, case.heads)
    return module.to(getattr(torch, case.dtype))


def call(module: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
    return module(tokens) if isinstance(module, Attention) else module(tokens, grid)


def make_step(module: nn.Module, case: Case, recompute: bool) -> Callable[[], Any]:
    """One call, or one step of training with or without chunks that are computed again."""
    shape = BATCH, case.side**2, case.channels
    tokens = torch.randn(shape).to(getattr(torch, case.dtype))
    if not case.training:
        return torch.no_grad()(lambda: call(module, tokens, case.grid))
    tokens.requires_grad_()
    wanted = [tokens, *module.parameters()]

    def step() -> None:
        before, halo.RECOMPUTED = halo.RECOMPUTED, 0 if recompute else 2**60
        try:
            torch.autograd.grad(call(module, tokens, case.grid).sum(), wanted)
        finally:
            halo.RECOMPUTED = before

    return step


def count_kept(module: nn.Module, case: Case, recompute: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside tokens and weights."""
    tokens = torch.randn(BATCH, case.side**2, case.channels, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (tokens, *module.parameters())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    before, halo.RECOMPUTED = halo.RECOMPUTED, 0 if recompute else 2**60
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(module, tokens, case.grid)
    finally:
        halo.RECOMPUTED = before
    return sum(size for size, _ in kept.values())


def list_contenders(case: Case) -> dict[str, tuple[Any, bool]]:
    """Settings by name, and whether chunks are computed again in the backward pass."""
    if case.training:
        chosen = {BLOCK: (CONTENDERS[BLOCK], False)}
        for name, again in (("halo 1/4–1/2", False), ("halo 1/4–1/2, recomputed", True)):
            chosen[name] = Halo(), again
        return chosen
    fits = case.side**2 <= MOST
    return {name: (s, False) for name, s in CONTENDERS.items() if s is not None or fits}


def measure(case: Case, rounds: int) -> list[Row]:
    """Time all contenders of a case in turn."""
    chosen = list_contenders(case)
    modules = {name: build(settings, case) for name, (settings, _) in chosen.items()}
    steps = {name: make_step(modules[name], case, again) for name, (_, again) in chosen.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if number:  # the first is to warm up
                times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    medians = {name: statistics.median(cpu for cpu, _ in each) for name, each in times.items()}
    rows = []
    for name, each in times.items():
        cpu, wall = zip(*each, strict=True)
        if case.training:
            memory = count_kept(modules[name], case, chosen[name][1])
        else:
            shape = BATCH, case.side**2, case.channels
            tokens = torch.randn(shape).to(getattr(torch, case.dtype))
            grid = [] if isinstance(modules[name], Attention) else [case.grid]
            memory = peak_bytes(modules[name], tokens, *grid)
        numbers = [medians[name], min(cpu), statistics.median(wall), min(wall)]
        rows.append(
            Row(
                **{**asdict(case), "batch": BATCH},
                contender=name,
                **dict(zip([f.name for f in fields(Row)][7:11], map(_to_ms, numbers), strict=True)),
                over_block=round(medians[name] / medians[BLOCK], 3),
                rounds=rounds,
                peak_mib=round(memory / 2**20, 1),
            )
        )
    return rows


def _to_ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of small cases; large ones have 3")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in CASES:
        rounds = options.rounds if case.side <= 64 else math.ceil(options.rounds / 3)
        rows += measure(case, rounds)
        for row in rows[-len(list_contenders(case)) :]:
            print(case, row.contender, row.cpu_ms, row.wall_ms, row.over_block, row.peak_mib)
        write_csv(options.out, [f.name for f in fields(Row)], map(asdict, rows))


if __name__ == "__main__":
    main()
