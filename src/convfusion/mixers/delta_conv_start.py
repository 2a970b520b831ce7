"""Start a ΔConvBlock from the attention that it replaces: its mean over the data, as a convolution.

A head h that attends to the offset Δ with mean weight a_h(Δ), whatever the query and the picture,
is a depthwise convolution of its values:

    out(x) = Σ_h W_o,h·[ Σ_{Δ in K×K} a_h(Δ)·W_v,h·x(·+Δ)  +  r_h·mean W_v,h·x ] + bias

A ΔConvBlock can be exactly that. Its first stage convolves the values, or as many of their leading
directions as it has channels for; the other half of the gate starts constant; and the mean branch
takes the attention r_h that falls outside of the window. What depends on the content is left to
learn.

Near a border some of the keys are missing, for the attention as for the convolution. Of a grid H×W,
(H − |Δy|)·(W − |Δx|) queries have the key at Δ, so that the mean over all queries is

    r_h = 1 − Σ_Δ a_h(Δ)·(H − |Δy|)·(W − |Δx|)/(H·W)

which is 0 where the window reaches across the grid from every token.

Of a video, Δ has an offset in time too, and a_h(Δ) is replaced by the product of a kernel along the
frames and one within them that is nearest to it, in the least squares. Where the block has no
kernels along the frames, what a query gives to other frames than its own is left to the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import (
    TokenSample,
    output_heads,
    project_heads,
    projections,
    score_scale,
)
from convfusion.mixers.offsets import (
    QUERIES,
    OffsetMeans,
    choose_queries,
    mean_offsets,
    offset_means,
)
from convfusion.ops.reference import gate_scale

if TYPE_CHECKING:
    from convfusion.mixers.delta_conv import DeltaConvBlock


@torch.no_grad()
def set_from_sample(block: DeltaConvBlock, attention: Any, sample: Sequence[TokenSample]) -> None:
    """Set a block to the mean of its attention over a sample.

    Raises:
        ConvFusionError: that mean is not finite.
    """
    config, found = block.config, []
    within, across = config.kernel_size // 2, config.frame_kernel_size // 2
    for tokens, grid, turn in sample:
        queries, keys, _ = project_heads(attention, tokens, turn)
        chosen = choose_queries(queries.shape[2], QUERIES)
        radii = [across, within, within][-len(grid) :]
        found += [
            offset_means(query, key, score_scale(attention), grid, radii, chosen)
            for query, key in zip(queries, keys, strict=True)
        ]
    means = mean_offsets(found)
    if not means.kernels.isfinite().all():
        raise ConvFusionError(
            "its mean attention is not finite: look at the data, or the frozen model"
        )
    set_to_mean_attention(block, attention, means)


@torch.no_grad()
def set_to_mean_attention(block: DeltaConvBlock, attention: Any, means: OffsetMeans) -> None:
    """Set a block to its attention with the map a_h(Δ) at every query; see the module's equation.

    Args:
        block: its further stages start at zero. The bias of its mean branch is left as `convert`
            set it, to that of uniform attention.
        attention: the diffusers attention that it stands for.
        means: attention at each offset within the kernel.
    """
    if means.kernels.dim() == 4:
        within, across = split_kernels(means.kernels)
        means = means._replace(kernels=across[..., None, None] * within[:, None])
    else:
        within, across = means.kernels, None
    heads, side = means.kernels.shape[0], means.kernels.shape[-1]
    half = block.proj_in.out_features // 2
    each = half // heads  # directions per head; channels that remain stay unused
    value = projections(attention)[2].weight.float().unflatten(0, (heads, -1))  # [h, d, C]
    out = output_heads(attention)  # [h, C, d]
    within = within.to(value.device, torch.float32)
    stage = block.convs[0].get_parameter("weight")
    stage[half:] = 0.0
    stage[half:, 0, side // 2, side // 2] = 1.0  # what is constant stays so, at the border too
    block.proj_in.weight[half:] = 0.0
    block.proj_in.bias.zero_()
    constant, factor = gate_constant(block)
    block.proj_in.bias[half:] = constant
    block.proj_out.weight.zero_()
    block.proj_out.bias.zero_()
    for head in range(heads):
        place = slice(head * each, (head + 1) * each)
        read, write = leading_directions(value[head], out[head], each)
        block.proj_in.weight[place] = read.to(stage.dtype)
        stage[place] = within[head].to(stage.dtype)
        if across is not None and block.config.frame_kernel_size:
            along = block.frame_convs[0].get_parameter("weight")  # a constant stays so there too
            along[place] = across[head].to(along.device, along.dtype)
        block.proj_out.weight[:, place] = (write / factor).to(stage.dtype)
    if block.mean_proj is not None:
        outside = means.outside().to(value.device, torch.float32)
        block.mean_proj.weight.copy_(torch.einsum("h,hcd,hde->ce", outside, out, value))


def split_kernels(kernels: Tensor) -> tuple[Tensor, Tensor]:
    """The product of a kernel within frames and one along them that is nearest to each kernel.

    Args:
        kernels: [h, K_t, K, K], none of them negative.

    Returns:
        [h, K, K], and [h, K_t] of length 1.
    """
    left, strength, right = torch.linalg.svd(kernels.flatten(2), full_matrices=False)
    sign = left[:, :, 0].sum(1).sign()[:, None]  # both of one sign, as the kernels are
    within = (sign * strength[:, :1] * right[:, 0]).unflatten(1, kernels.shape[2:])
    return within, sign * left[:, :, 0]


def leading_directions(value: Tensor, out: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best approximation of out·value by `count` directions: ([count, C], [C, count]).

    Args:
        value: W_v of a head, [d, C].
        out: W_o of a head, [C, d].
        count: directions; beyond d they are 0.
    """
    basis_out, weights_out = torch.linalg.qr(out)
    basis_value, weights_value = torch.linalg.qr(value.T)
    left, strength, right = torch.linalg.svd(weights_out @ weights_value.T)
    root = strength.sqrt()
    read, write = (root[:, None] * right) @ basis_value.T, basis_out @ (left * root)
    pad = max(0, count - len(root))
    read = nn.functional.pad(read[:count], (0, 0, 0, pad))
    return read, nn.functional.pad(write[:, :count], (0, pad))


def gate_constant(block: DeltaConvBlock) -> tuple[float, float]:
    """A value for f2 at which the gate is linear in f1, and what it then multiplies f1 with."""
    if block.config.gate == "sigmoid":
        return 0.0, 0.5
    return 1.0, gate_scale(block.proj_in.out_features, block.config.gate)
