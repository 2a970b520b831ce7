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

Of a video, a_h(Δt, Δy, Δx) is the product of a kernel along the frames and one within them that is
nearest by a singular value decomposition; without kernels along the frames, Δt is 0. Where there is
a branch for the first frame, it takes what of r_h goes to that frame beyond its even share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import output_heads, project_heads, projections, score_scale
from convfusion.mixers.offsets import (
    QUERIES,
    OffsetMeans,
    choose_queries,
    mean_offsets,
    offset_means,
)
from convfusion.mixers.tokens import Grid, TokenSample
from convfusion.ops.reference import gate_scale

if TYPE_CHECKING:
    from convfusion.mixers.delta_conv import DeltaConvBlock


@torch.no_grad()
def set_from_sample(block: DeltaConvBlock, attention: Any, sample: Sequence[TokenSample]) -> None:
    """Set a block to the mean of its attention over a sample.

    Raises:
        ConvFusionError: that mean is not finite.
    """
    radius, frames, found = block.config.kernel_size // 2, block.config.frame_kernel_size // 2, []
    for each in sample:
        queries, keys, _ = project_heads(attention, each)
        chosen = choose_queries(queries.shape[2], QUERIES)
        radii = [frames, radius, radius][-len(each.grid) :]
        found += [
            offset_means(query, key, score_scale(attention), each.grid, radii, chosen)
            for query, key in zip(queries, keys, strict=True)
        ]
    means = mean_offsets(found)
    if not means.kernels.isfinite().all():
        raise ConvFusionError(
            "its mean attention is not finite: look at the data, or the frozen model"
        )
    set_to_mean_attention(block, attention, means, _count_frames(sample[0].grid))


@torch.no_grad()
def set_to_mean_attention(
    block: DeltaConvBlock, attention: Any, means: OffsetMeans, frames: int = 1
) -> None:
    """Set a block to its attention with the map a_h(Δ) at every query; see the module's equation.

    Args:
        block: its further stages start at zero. The bias of its mean branch is left as `convert`
            set it, to that of uniform attention.
        attention: the diffusers attention that it stands for.
        means: attention at each offset within the kernel.
        frames: T of the videos that they are of.
    """
    heads, side = attention.heads, means.kernels.shape[-1]
    half = block.proj_in.out_features // 2
    each = half // heads  # directions per head; channels that remain stay unused
    value = projections(attention)[2].weight.float().unflatten(0, (heads, -1))  # [h, d, C]
    out = output_heads(attention)  # [h, C, d]
    means = means._replace(kernels=means.kernels.to(value.device, torch.float32))
    across, kernels, outside = split_frames(means)
    stage = block.convs[0].get_parameter("weight")
    stage[half:] = 0.0
    stage[half:, 0, side // 2, side // 2] = 1.0  # what is constant stays so, at the border too
    if block.config.frame_kernel_size:
        nn.init.dirac_(block.frame_conv.weight, groups=2 * half)
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
        stage[place] = kernels[head].to(stage.dtype)
        block.proj_out.weight[:, place] = (write / factor).to(stage.dtype)
        if block.config.frame_kernel_size:
            block.frame_conv.weight[place] = across[head][..., None].to(stage.dtype)
    first = torch.zeros_like(outside)
    if block.config.first_frame_branch:
        if frames > 1:  # what the mean gives that frame anyway is left to the mean
            first = (means.first.to(outside) - outside / frames) / (1 - 1 / frames)
            first = torch.minimum(first.clamp(min=0), outside)
        weight = torch.einsum("h,hcd,hde->ce", first, out, value)
        block.first_frame_proj.weight.copy_(weight)
    if block.mean_proj is not None:
        weight = torch.einsum("h,hcd,hde->ce", outside - first, out, value)
        block.mean_proj.weight.copy_(weight)


def _divide(values: Tensor, by: Tensor) -> Tensor:
    """A quotient that is 0 where nothing is there to divide by."""
    return torch.where(by > 0, values / by.clamp(min=1e-8), 0.0)


def _count_frames(grid: Grid) -> int:
    """T of a grid (T, H, W); 1 of a picture."""
    return grid[0] if len(grid) == 3 else 1


def split_frames(means: OffsetMeans) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels along the frames and within them, and the attention that they leave.

    Returns:
        [h, 1, K_t] and [h, K, K], whose product is nearest to a_h(Δ), where an offset counts as
        often as queries have a key there; and r_h [h]. Of pictures the first is 1.
    """
    kernels = means.kernels
    if kernels.dim() == 3:
        return kernels.new_ones(len(kernels), 1, 1), kernels, means.outside().to(kernels)
    share = means.share.to(kernels)  # the product of one along the frames and one within them
    root = share.sqrt()
    left, strength, right = torch.linalg.svd((kernels * root).flatten(2), full_matrices=False)
    middle = [side // 2 for side in share.shape]
    over, inner = root[:, middle[1], middle[2]], root[middle[0]]
    sign = left[..., 0].sum(1).sign()  # attention is positive, and so are both of its factors
    across = _divide(left[..., 0], over) * sign[:, None]
    within = _divide((right[:, 0] * strength[:, :1]).unflatten(1, inner.shape), inner)
    within = within * sign[:, None, None]
    total = across.sum(1).clamp(min=1e-8)
    across, within = across / total[:, None], within * total[:, None, None]
    nearest = means._replace(kernels=across[:, :, None, None] * within[:, None])
    return across[:, None], within, nearest.outside().to(kernels)


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
