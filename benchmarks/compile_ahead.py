"""Compile the kernels for a GPU that need not be there.

The launches are those of a real call, on tensors of the `meta` device. So it is known on any
machine that the kernels compile, and what a thread of each takes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convfusion.ops import kernels, launch

ENTRIES = (
    "conv_gate",
    "conv_gate_grad",
    "conv_input_grad",
    "conv_weight_grad",
    "upsample",
    "upsample_grad",
)
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, over how many programs, with which arguments."""

    kernel: str
    programs: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target: its intermediate code and what a thread and a program take."""

    kernel: str
    code: str
    registers: int
    stack: int  # bytes of local memory: registers that did not suffice
    shared: int  # bytes of a program


def launches(
    tokens: tuple[int, int, int],
    grid: tuple[int, int],
    kernel_size: int,
    stages: int,
    gate: str,
    dtype: torch.dtype,
) -> list[Launch]:
    """What forward and backward of the pyramid launch, in order, for tokens of shape (B, N, C')."""
    x = torch.empty(tokens, dtype=dtype, device="meta")
    weights = x.new_empty(stages, kernel_size**2, tokens[2])
    with _recorded() as found:
        out = launch.forward(x, weights, grid, gate)
        launch.backward(out, x, weights, grid, gate)
    return found


def compile_for(capability: int, wanted: Launch) -> Compiled:
    """Compile a launch for an NVIDIA GPU, such as 90 for the compute capability 9.0.

    Raises:
        triton.CompilationError: it does not compile.
    """
    kernel = getattr(kernels, wanted.kernel)
    options = {"num_warps": wanted.constants["num_warps"]}
    constants = {k: v for k, v in wanted.constants.items() if k != "num_warps"}
    signature: dict[str, str] = dict.fromkeys(kernel.arg_names, "constexpr")
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, wanted.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):  # as Triton's launcher does
            constants[name] = value
            continue
        signature[name] = _type_of(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    return Compiled(
        wanted.kernel, compiled.asm["ttir"], usage["REG"], usage["STACK"], usage["SHARED"]
    )


class _Recorder:
    """Stands where a kernel stands, and keeps what it is launched with."""

    def __init__(self, name: str, found: list[Launch]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        def keep(*args: Any, **constants: Any) -> None:
            self.found.append(Launch(self.name, programs, args, constants))

        return keep


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    found: list[Launch] = []
    stands: Any = {name: _Recorder(name, found) for name in ENTRIES}
    with patch.multiple(kernels, **stands):
        yield found


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _usage(binary: bytes) -> dict[str, int]:
    """Registers, stack and shared memory, as the tool that comes with Triton reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", said)}
