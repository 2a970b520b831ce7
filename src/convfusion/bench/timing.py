"""Times that can be compared: calls in turn, after a warm-up, with their spread and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Timing:
    """What one call took.

    Attributes:
        seconds: of each counted round, in their order.
        peak_bytes: the most memory that it held above what was held before it; None where the
            system does not tell.
    """

    seconds: tuple[float, ...]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 5,
    on_call: Callable[[str], None] | None = None,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time each call once a round, A B C A B C …, so that a drift of the machine meets all.

    A first call of each warms the caches up; it is not counted, and its memory is measured. What
    compiles at its first call should have been called before. Calls that take minutes can do
    without: then the memory is that of the first round.

    Args:
        calls: by name; what they return is thrown away.
        device: that they work on; it is waited for before the clock is read.
        rounds: counted ones.
        on_call: told the name before each call.
        warm_up: make the first, uncounted call.
    """

    def run(name: str) -> float:
        if on_call is not None:
            on_call(name)
        synchronise(device)
        start = time.perf_counter()
        calls[name]()
        synchronise(device)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def count(name: str) -> None:
        seconds[name].append(run(name))

    first = run if warm_up else count
    peaks = {name: measure_peak(partial(first, name), device) for name in calls}
    for _ in range(rounds if warm_up else rounds - 1):
        for name in calls:
            count(name)
    return {name: Timing(tuple(seconds[name]), peaks[name]) for name in calls}


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a call held above what was held before it.

    On CUDA by PyTorch's allocator; on the CPU under Linux by the process's resident memory, whose
    high-water mark is set back first; elsewhere the call is made and None returned.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _reset_high_water():
        call()
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _reset_high_water() -> bool:
    try:
        _return_free_memory()
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """What the C library holds of freed memory would hide as much of what a call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a measured row must say of where it was measured."""
    import diffusers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"
