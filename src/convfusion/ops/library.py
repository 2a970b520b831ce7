"""The operation that PyTorch knows, and who computes it.

`pyramid` is for everyone. It goes to the kernels if `can_fuse` says so, else to `reference`.
The rule, in one line: CUDA tensors in half, bfloat16 or float32, `ceil` pooling, Triton ≥ 3.3, and
CONVFUSION_KERNELS=1 in the environment when this module is imported. They wait to be asked for
until they have run on a GPU.

TRITON_INTERPRET=1, Triton's own variable, sends tensors of the CPU to the kernels, which its
interpreter then runs, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from convfusion.ops import reference
from convfusion.ops.operations import backward_flops, forward_flops

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = "3.3"  # Triton: the oldest that kernels were compiled with


def _is_available() -> bool:
    """Whether a Triton that compiles the kernels is installed; it is not imported yet."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return False
    return TorchVersion(installed) >= OLDEST


AVAILABLE = _is_available()
WANTED = os.environ.get("CONVFUSION_KERNELS") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def can_fuse(tokens: Tensor, weights: Sequence[Tensor], pooling: str = "ceil") -> bool:
    """Whether the kernels take tokens of this device and dtype, pooled in this way.

    Weights that wait on another device, as under sequential offload, are left to their modules.
    """
    here = (WANTED and tokens.is_cuda) or (INTERPRETED and tokens.device.type == "cpu")
    known = AVAILABLE and pooling == "ceil" and tokens.dtype in DTYPES
    return here and known and all(weight.device == tokens.device for weight in weights)


def pyramid(
    tokens: Tensor,
    weights: Sequence[Tensor],
    grid: tuple[int, int],
    gate: str,
    pooling: str = "ceil",
) -> Tensor:
    """All stages of tokens [B, N, C'], side by side: [B, N, n·C'/2].

    What it computes is `reference.pyramid_of_tokens`.

    On the kernels' path the weights are taken in the dtype of the tokens, as autocast would have
    them; sums are float32. Gradients reach tokens and weights and are the same bits every time;
    gradients of gradients need the reference.
    """
    if not can_fuse(tokens, weights, pooling):
        return reference.pyramid_of_tokens(tokens, weights, grid, gate, pooling)
    packed = torch.stack([weight.flatten(1).t() for weight in weights]).to(tokens.dtype)
    return pyramid_op(tokens, packed, *grid, gate)


@torch.library.custom_op("convfusion::pyramid", mutates_args=())
def pyramid_op(tokens: Tensor, weights: Tensor, height: int, width: int, gate: str) -> Tensor:
    """The kernels' forward pass; weights [n, K·K, C'] in the dtype of the tokens [B, N, C']."""
    from convfusion.ops import launch

    return launch.forward(tokens.contiguous(), weights.contiguous(), (height, width), gate)


@torch.library.custom_op("convfusion::pyramid_backward", mutates_args=())
def pyramid_backward_op(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor,
    height: int,
    width: int,
    gate: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and weights; the second is empty without `weight_grad`."""
    from convfusion.ops import launch

    tensors = (grad.contiguous(), tokens.contiguous(), weights.contiguous())
    return launch.backward(*tensors, (height, width), gate, weight_grad)


@pyramid_op.register_fake
def _(tokens: Tensor, weights: Tensor, height: int, width: int, gate: str) -> Tensor:
    return tokens.new_empty(*tokens.shape[:2], weights.shape[0] * (weights.shape[2] // 2))


@pyramid_backward_op.register_fake
def _(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor,
    height: int,
    width: int,
    gate: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    shape = weights.shape if weight_grad else (0,)
    return tokens.new_empty(tokens.shape), weights.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weights, ctx.height, ctx.width, ctx.gate = inputs
    ctx.save_for_backward(tokens, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    wanted = ctx.needs_input_grad[1]
    tokens_grad, weights_grad = pyramid_backward_op(
        grad, *ctx.saved_tensors, ctx.height, ctx.width, ctx.gate, wanted
    )
    return tokens_grad, weights_grad if wanted else None, None, None, None


pyramid_op.register_autograd(_backward, setup_context=_setup_context)

# For `FlopCounterMode(custom_mapping=…)`: by operation, its count from the shapes of its arguments.
FLOPS = {
    torch.ops.convfusion.pyramid: forward_flops,
    torch.ops.convfusion.pyramid_backward: backward_flops,
}
