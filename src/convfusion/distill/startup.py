"""Start the blocks from the attention they replace: its mean over the data, as a convolution.

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
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convfusion.analysis.streaming import Measure, OffsetMeans, mean_offsets, offset_means
from convfusion.data.latents import LatentDataset, TrainingData, prepare_data
from convfusion.distill.batches import BatchIndices
from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser, Site, denoiser_of, family_of
from convfusion.families.conditioning import place_conditioning
from convfusion.families.watch import project, watch_attention
from convfusion.mixers.base import Grid
from convfusion.mixers.delta_conv import DeltaConvBlock
from convfusion.ops.reference import gate_scale
from convfusion.schedule import add_noise, noise_schedule
from convfusion.surgery import attention_teacher, mixers_of
from convfusion.surgery.record import TrainingRecord, record_of, set_record


@torch.no_grad()
def start_from_attention(
    pipe: Any,
    data: LatentDataset | TrainingData,
    *,
    pictures: int = 32,
    batch_size: int = 8,
    settings: Measure = Measure(queries=256),
    seed: int = 0,
    only: Collection[str] | None = None,
) -> None:
    """Set every ΔConvBlock of a converted pipeline to the mean attention of its site.

    The mean is taken over noised latents at random timesteps. Sites with another mixer are left
    alone.

    Args:
        pipe: converted, with its attention kept.
        data: what the mean is taken over.
        pictures: how many of them to look at.
        batch_size: at once.
        settings: queries and memory of the measurement.
        seed: of pictures, noises and timesteps.
        only: paths of the sites whose blocks are set; None sets all.

    Raises:
        ConvFusionError: the model is not converted, or its attention was dropped; or a mean is not
            finite, because the data or the model are not. Blocks set before it stay set.
    """
    student = denoiser_of(pipe)
    blocks = {p: m for p, m in mixers_of(student).items() if isinstance(m, DeltaConvBlock)}
    if only is not None:
        blocks = {path: block for path, block in blocks.items() if path in only}
        if not blocks:
            return
    teacher = attention_teacher(student)
    batches = draw_noised_batches(pipe, data, pictures, batch_size, seed)
    for path, means in measure_offsets(teacher, blocks, batches, settings).items():
        if not means.kernels.isfinite().all():
            raise ConvFusionError(
                f"the mean attention of {path} is not finite: look at the data, or the frozen model"
            )
        set_to_mean_attention(blocks[path], teacher.get_submodule(path), means)
        set_record(blocks[path], TrainingRecord("attention"))


def measure_offsets(
    teacher: Denoiser,
    blocks: Mapping[str, DeltaConvBlock],
    calls: Iterable[Mapping[str, Any]],
    settings: Measure,
) -> dict[str, OffsetMeans]:
    """The mean attention of sites at each offset within the kernel of their block.

    Args:
        teacher: with the attention in place.
        blocks: by path of the site.
        calls: keyword arguments of the denoiser, a batch each.
        settings: queries and memory of the measurement.
    """
    measured: dict[str, list[OffsetMeans]] = {path: [] for path in blocks}

    def see(site: Site, attention: Any, tokens: Tensor, grid: Grid) -> None:
        if site.path not in blocks:
            return
        radius = blocks[site.path].config.kernel_size // 2
        for query, key in zip(*project(attention, tokens), strict=True):
            means = offset_means(query, key, attention.scale, grid, radius, settings)
            measured[site.path].append(means)

    with watch_attention(teacher, see):
        for call in calls:
            teacher(**call)
    return {path: mean_offsets(means) for path, means in measured.items()}


def draw_noised_batches(
    pipe: Any, data: LatentDataset | TrainingData, pictures: int, batch_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Calls of a denoiser on noised latents at random timesteps, as keyword arguments."""
    denoiser, ready = denoiser_of(pipe), prepare_data(pipe, data)
    batches = BatchIndices(ready.groups, min(batch_size, pictures), seed)
    generator = torch.Generator().manual_seed(seed)
    schedule, _ = noise_schedule(pipe.scheduler)
    for number in range(-(-pictures // batch_size)):
        part = batches[number]
        clean, conditioning = ready.take(part, [False] * len(part))
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, len(schedule), (len(part),), generator=generator)
        noisy = add_noise(clean, noise, timesteps, schedule)
        yield {
            family_of(denoiser).latents: noisy.to(denoiser.device, denoiser.dtype),
            "timestep": timesteps.to(denoiser.device),
            "return_dict": False,
            **place_conditioning(conditioning, denoiser),
        }


def blocks_to_start(student: Denoiser) -> set[str]:
    """The paths of the mixers that neither training nor a start has changed since `convert`."""
    return {p for p, mixer in mixers_of(student).items() if not record_of(mixer).is_started}


@torch.no_grad()
def set_to_mean_attention(block: DeltaConvBlock, attention: Any, means: OffsetMeans) -> None:
    """Set a block to its attention with the map a_h(Δ) at every query; see the module's equation.

    Args:
        block: its further stages start at zero. The bias of its mean branch is left as `convert`
            set it, to that of uniform attention.
        attention: the diffusers `Attention` it stands for.
        means: attention at each offset within the kernel.
    """
    heads, side = means.kernels.shape[:2]
    half = block.proj_in.out_features // 2
    each = half // heads  # directions per head; channels that remain stay unused
    value = attention.to_v.weight.float().unflatten(0, (heads, -1))  # [h, d, C]
    out = attention.to_out[0].weight.float().unflatten(1, (heads, -1)).transpose(0, 1)  # [h, C, d]
    kernels = means.kernels.to(value.device, torch.float32)
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
        stage[place] = kernels[head].to(stage.dtype)
        block.proj_out.weight[:, place] = (write / factor).to(stage.dtype)
    if block.mean_proj is not None:
        outside = means.outside().to(value.device, torch.float32)
        block.mean_proj.weight.copy_(torch.einsum("h,hcd,hde->ce", outside, out, value))


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
