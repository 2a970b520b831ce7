"""Parity, then speed, of the fused pyramid on a CUDA GPU.

    python benchmarks/pyramid.py                 check, measure, write results/kernels_gpu.csv
    python benchmarks/pyramid.py --dry-run       the cases, with bytes and operations counted
    python benchmarks/pyramid.py --compile 90    registers of every kernel, for H100

The last two need no GPU. Nothing is timed before every kernel agrees with the reference in float64
and gives the same bits twice.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.ops import library, reference
from convfusion.ops.operations import convolution_flops

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BOUND = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}  # of the error's norm, relative
PASSES = ("forward", "forward + backward")
GATES = ("scaled", "reference", "sigmoid")


@dataclass(frozen=True)
class Case:
    """One shape: `batch` grids of height × width with `channels` C' behind `proj_in`."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    kernel: int
    stages: int
    gate: str = "scaled"

    @property
    def grid(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.batch, self.height * self.width, self.channels


CASES = (
    # The size at which the paper's authors time their own depthwise kernel.
    Case("depthwise 9", 8, 64, 64, 1152, 9, 1),
    Case("depthwise 13", 8, 64, 64, 1152, 13, 1),
    Case("depthwise 17", 8, 64, 64, 1152, 17, 1),
    # Sites at the ratio 1/2 and two pictures, as under classifier-free guidance.
    Case("SD1.5 512, level 0", 2, 64, 64, 160, 7, 2),
    Case("SD1.5 512, level 1", 2, 32, 32, 320, 9, 2),
    Case("SD1.5 512, level 2", 2, 16, 16, 640, 5, 2),
    Case("SDXL 1024, level 1", 2, 64, 64, 320, 9, 2),
    Case("SDXL 1024, level 2", 2, 32, 32, 640, 7, 2),
    Case("PixArt 1024", 2, 64, 64, 576, 13, 2, "sigmoid"),
    Case("PixArt 4096", 1, 256, 256, 576, 13, 2, "sigmoid"),
)


@dataclass(frozen=True)
class Row:
    """A line of the table; times in milliseconds, the middle of many runs and its quintiles."""

    case: str
    dtype: str
    work: str
    path: str
    ms: float
    ms_low: float
    ms_high: float
    bytes: int
    operations: int
    operations_per_byte: float
    bound: str
    share_of_copy: float
    share_of_fp32: float
    copy_gb_per_s: float
    fp32_tflops: float
    device: str
    torch: str
    triton: str
    cuda: str


# What is counted


def forward_bytes(case: Case, size: int) -> int:
    """Bytes between the fused forward kernels and memory, each map counted once per kernel.

    With n stages of N_i pixels: stage i reads C'·N_i, writes C'/2·N_i and, unless it is the last,
    C'·N_{i+1} for the next; resizing reads C'/2·N_i and writes C'/2·N for every i > 0.

    Args:
        case: the shape.
        size: bytes of an element.
    """
    sides = reference.pooled_sides(case.grid, case.stages)
    pixels = [height * width for height, width in sides]
    half = case.channels // 2
    moved = sum(case.channels * count + half * count for count in pixels)
    moved += sum(case.channels * count for count in pixels[1:])
    moved += sum(half * (count + pixels[0]) for count in pixels[1:])
    return size * (case.batch * moved + case.stages * case.kernel**2 * case.channels)


def backward_bytes(case: Case, size: int) -> int:
    """The same of the fused backward kernels; partial sums of the weights are left out.

    Stage i: resizing reads C'/2·N and writes C'/2·N_i (i > 0); the gate's gradient reads C'·N_i
    and C'/2·N_i, writes C'·N_i and C'·N_{i+1}; the input's reads C'·N_i and C'·N_{i+1} and writes
    C'·N_i; the weights' reads 2·C'·N_i.
    """
    sides = reference.pooled_sides(case.grid, case.stages)
    pixels = [height * width for height, width in sides]
    half = case.channels // 2
    moved = sum((2 * case.channels + half) * count for count in pixels)  # the gate's
    moved += sum(4 * case.channels * count for count in pixels)  # the input's and the weights'
    moved += sum(2 * case.channels * count for count in pixels[1:])  # pooled maps, both ways
    moved += sum(half * (count + pixels[0]) for count in pixels[1:])
    return size * (case.batch * moved + 3 * case.stages * case.kernel**2 * case.channels)


def work_of(case: Case, size: int, work: str) -> tuple[int, int]:
    """Bytes and operations (two per multiply-add of a convolution) of one of `PASSES`."""
    packed = (case.stages, case.kernel**2, case.channels)
    operations = convolution_flops(case.tokens, packed, case.grid)
    moved = forward_bytes(case, size)
    if work == "forward":
        return moved, operations
    return moved + backward_bytes(case, size), 4 * operations


def bound_of(moved: int, operations: int, copy: float, fp32: float) -> str:
    """Which unit binds, memory or arithmetic, at so many bytes and operations a second."""
    return "memory" if moved / copy > operations / fp32 else "arithmetic"


# Parity


def check_parity(case: Case, dtype: str, device: str = "cuda") -> None:
    """Compare output and gradients with the reference in float64, and two runs bit by bit.

    Raises:
        ConvFusionError: they differ.
    """
    tokens, weights, grad = tensors(case, DTYPES[dtype], device)
    found = run(library.pyramid, tokens, weights, grad, case)
    exact = [tensor.double() for tensor in (tokens, *weights, grad)]
    expected = run(reference.pyramid_of_tokens, exact[0], exact[1:-1], exact[-1], case)
    names = ["output", "gradient of the tokens"]
    names += [f"gradient of the weights of stage {i}" for i in range(case.stages)]
    for name, one, other in zip(names, found, expected, strict=True):
        error = ((one.double() - other).norm() / other.norm()).item()
        if not error <= BOUND[dtype]:
            raise ConvFusionError(f"{case} in {dtype}: the {name} is off by {error:.1e}")
    again = run(library.pyramid, tokens, weights, grad, case)
    if not all(torch.equal(one, other) for one, other in zip(found, again, strict=True)):
        raise ConvFusionError(f"{case} in {dtype}: two runs differ")


def parity_cases() -> list[Case]:
    """Odd, long and small grids, channels that fill no block, every gate and number of stages."""
    kernels, stages = (1, 3, 5, 7, 9, 13, 17, 21), (1, 2, 3)
    grids = ((33, 47), (1, 65), (64, 1), (5, 3))
    shapes = [
        Case("parity", 2, *grid, 72, kernel, count, gate)
        for (kernel, grid), count, gate in product(product(kernels, grids), stages, GATES)
    ]
    return shapes[::5]  # every value of each, not every combination


def tensors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Tokens, the weights of each stage and a gradient of the output, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    side = case.kernel
    weights = [draw(case.channels, 1, side, side) / side for _ in range(case.stages)]
    return draw(*case.tokens), weights, draw(*case.tokens[:2], case.channels // 2 * case.stages)


def run(
    pyramid: Callable[..., Tensor],
    tokens: Tensor,
    weights: Sequence[Tensor],
    grad: Tensor | None,
    case: Case,
) -> list[Tensor]:
    """Output and, of a gradient, those of tokens and weights."""
    if grad is None:
        return [pyramid(tokens, weights, case.grid, case.gate)]
    leaves = [tensor.detach().requires_grad_() for tensor in (tokens, *weights)]
    out = pyramid(leaves[0], leaves[1:], case.grid, case.gate)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


# Speed


def planar(tokens: Tensor, *args: Any) -> Tensor:
    """The reference on maps [B, C', H, W] that are contiguous, which some convolutions prefer."""
    return reference.pyramid_of_tokens(tokens.transpose(1, 2).contiguous().transpose(1, 2), *args)


PATHS: dict[str, Callable[..., Tensor]] = {
    "fused": library.pyramid,
    "unfused": reference.pyramid_of_tokens,
    "unfused, planar": planar,
}


def timed(function: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, first and last quintile in milliseconds; the cache is cleared between runs."""
    from triton.testing import do_bench

    middle, low, high = do_bench(function, warmup=100, rep=400, quantiles=[0.5, 0.2, 0.8])
    return middle, low, high


def measured_limits() -> tuple[float, float]:
    """What this device does: bytes a second of a large copy, operations a second in float32."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / (timed(lambda: target.copy_(source))[0] * 1e-3)
    side = 4096
    left, right = torch.randn(2, side, side, device="cuda")
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        fp32 = 2 * side**3 / (timed(lambda: left @ right)[0] * 1e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return copy, fp32


def measure(case: Case, dtype: str, limits: tuple[float, float]) -> list[Row]:
    """Every path through both passes of one case."""
    from triton import __version__ as triton_version

    tokens, weights, grad = tensors(case, DTYPES[dtype], "cuda")
    device = torch.cuda.get_device_name()
    versions = (str(torch.__version__), str(triton_version), str(torch.version.cuda))
    copy, fp32 = limits
    rows = []
    for work, path in product(PASSES, PATHS):
        wanted = None if work == "forward" else grad
        ms, low, high = timed(partial(run, PATHS[path], tokens, weights, wanted, case))
        moved, count = work_of(case, tokens.element_size(), work)
        bound = bound_of(moved, count, copy, fp32)
        of_copy, of_fp32 = moved / copy / (ms * 1e-3), count / fp32 / (ms * 1e-3)
        found = Row(
            case.name, dtype, work, path, ms, low, high, moved, count, count / moved, bound,
            of_copy, of_fp32, copy / 1e9, fp32 / 1e12, device, *versions,
        )  # fmt: skip
        rows.append(found)
    return rows


def write(rows: list[Row], out: Path) -> None:
    """A CSV, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".part")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(field.name for field in fields(Row))
        for row in rows:
            values = (getattr(row, field.name) for field in fields(Row))
            table.writerow(f"{v:.5g}" if isinstance(v, float) else v for v in values)
    unfinished.replace(out)


# The command


def list_cases(dtypes: Sequence[str]) -> None:
    """Print what would be measured, with what can be counted beforehand."""
    for case, dtype, work in product(CASES, dtypes, PASSES):
        moved, operations = work_of(case, DTYPES[dtype].itemsize, work)
        print(
            f"{case.name:20} {dtype:9} {work:19} {case.batch}×{case.height}×{case.width}"
            f"×{case.channels} K={case.kernel} n={case.stages}: {moved / 1e6:.1f} MB, "
            f"{operations / 1e9:.2f} G operations, {operations / moved:.0f} a byte"
        )


def list_compiled(capability: int, dtypes: Sequence[str]) -> None:
    """Print what a thread of each kernel takes on a GPU of this compute capability."""
    from compile_ahead import compile_for, launches

    done = set()
    for case, dtype in product(CASES, dtypes):
        arguments = (case.tokens, case.grid, case.kernel, case.stages, case.gate, DTYPES[dtype])
        for launch in launches(*arguments):
            key = (dtype, launch.kernel, str(launch.constants))
            if key in done:
                continue
            done.add(key)
            found = compile_for(capability, launch)
            print(
                f"{case.name:20} {dtype:9} {found.kernel:17} {found.registers} registers, "
                f"{found.stack} bytes of stack, {found.shared} of shared memory",
                flush=True,
            )


def check_and_measure(dtypes: Sequence[str], out: Path) -> None:
    """Parity of everything, then times of everything.

    Raises:
        ConvFusionError: no CUDA GPU, no Triton, or a kernel that differs from the reference.
    """
    if not torch.cuda.is_available():
        raise ConvFusionError(
            "no CUDA GPU here: --dry-run lists the cases and --compile 90 compiles them without one"
        )
    if not library.AVAILABLE:
        raise ConvFusionError("there is no Triton ≥ 3.3 here: pip install 'convfusion[triton]'")
    if not library.WANTED:
        raise ConvFusionError("the kernels wait to be asked for: set CONVFUSION_KERNELS=1")
    shapes = parity_cases()
    for case, dtype in product(shapes, dtypes):
        check_parity(case, dtype)
    print(f"{len(shapes)} shapes × {len(dtypes)} dtypes agree with the reference")
    limits, rows = measured_limits(), []
    for case, dtype in product(CASES, dtypes):
        rows += measure(case, dtype, limits)
        for row in rows[-len(PASSES) * len(PATHS) :]:
            print(
                f"{row.case:20} {dtype:9} {row.work:19} {row.path:16} {row.ms:9.3f} ms", flush=True
            )
    write(rows, out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cases and stop")
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="compile and stop")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("results/kernels_gpu.csv"))
    args = parser.parse_args(argv)
    try:
        if args.dry_run:
            list_cases(args.dtypes)
        elif args.compile:
            list_compiled(args.compile, args.dtypes)
        else:
            check_and_measure(args.dtypes, args.out)
    except ConvFusionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
