"""Blocks that start as the mean of the attention they replace."""

from typing import get_args

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_pipelines import PIPELINES

import convfusion
from convfusion import ConvFusionError, DeltaConv, MeanOnly, uniform
from convfusion.analysis.streaming import Measure, offset_means
from convfusion.data import LatentDataset
from convfusion.distill.startup import (
    leading_directions,
    set_to_mean_attention,
    start_from_attention,
)
from convfusion.families import denoiser_of, list_sites
from convfusion.mixers.delta_conv import Gate
from convfusion.surgery import mixers_of


def attention_with_bias(channels: int, heads: int) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=channels, heads=heads, dim_head=channels // heads, bias=True).eval()


@pytest.mark.parametrize("gate", get_args(Gate))
@pytest.mark.parametrize("ratio", [2.0, 3.0])
@torch.no_grad()
def test_the_block_is_the_equation(gate, ratio):
    """A map a_h(Δ) at every query, written out with loops; zero outside of the grid."""
    channels, heads, grid, side = 8, 2, (5, 6), 3
    attention = attention_with_bias(channels, heads)
    block = DeltaConv(side, gate=gate, ratio=ratio).build(channels)
    block.init_from(attention)
    kernels = torch.rand(heads, side, side, dtype=torch.float64) / side**2
    set_to_mean_attention(block, attention, kernels)
    x = torch.randn(2, 30, channels)
    values = (x @ attention.to_v.weight.T).unflatten(-1, (heads, -1))  # the bias comes at the end
    mean = values.mean(dim=1)
    mixed = torch.zeros_like(values)
    for head in range(heads):
        a = kernels[head].float()
        for row in range(5):
            for column in range(6):
                token = row * 6 + column
                mixed[:, token, head] = (1 - a.sum()) * mean[:, head]
                for i in range(side):
                    for j in range(side):
                        r, c = row + i - 1, column + j - 1
                        if 0 <= r < 5 and 0 <= c < 6:
                            mixed[:, token, head] += a[i, j] * values[:, r * 6 + c, head]
    expected = attention.to_out[0](mixed.flatten(2) + attention.to_v.bias)
    assert torch.allclose(block(x, grid), expected, atol=1e-5)


@torch.no_grad()
def test_few_channels_keep_the_leading_directions():
    value, out = torch.randn(6, 16), torch.randn(16, 6)
    product = out @ value
    errors = []
    for count in range(1, 9):
        read, write = leading_directions(value, out, count)
        assert read.shape == (count, 16) and write.shape == (16, count)
        errors.append((write @ read - product).norm().item())
    best = torch.linalg.svdvals(product)
    expected = [best[count:].square().sum().sqrt().item() for count in range(1, 9)]
    assert errors == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_offset_means_against_the_whole_map():
    torch.manual_seed(1)
    grid, radius = (5, 7), 2
    query, key = torch.randn(2, 3, 35, 4)
    maps = torch.softmax(0.5 * query @ key.transpose(1, 2), dim=-1).double()
    sums, counts = torch.zeros(3, 5, 5, dtype=torch.float64), torch.zeros(5, 5)
    for q in range(35):
        for k in range(35):
            i, j = k // 7 - q // 7 + radius, k % 7 - q % 7 + radius
            if 0 <= i < 5 and 0 <= j < 5:
                sums[:, i, j] += maps[:, q, k]
                counts[i, j] += 1
    found = offset_means(query, key, 0.5, grid, radius, Measure(queries=64))
    assert torch.allclose(found, sums / counts, atol=1e-6)


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_family_starts_from_its_attention(kind):
    pipe = PIPELINES[kind]()
    model = denoiser_of(pipe)
    side = model.config.sample_size
    data = LatentDataset(torch.randn(4, 4, side, side), ["red", "green", "apple", ""])
    if kind == "dit":
        data = LatentDataset(data.latents, ["red", "green", "apple", "3"])
    first = list_sites(model)[0].path
    convfusion.convert(pipe, convfusion.ConvertConfig({first: MeanOnly(), "*": DeltaConv(3)}))
    before = {
        p: {k: v.clone() for k, v in m.state_dict().items()} for p, m in mixers_of(pipe).items()
    }
    start_from_attention(pipe, data)
    for path, mixer in mixers_of(pipe).items():
        assert all(value.isfinite().all() for value in mixer.state_dict().values())
        same = all(torch.equal(v, before[path][k]) for k, v in mixer.state_dict().items())
        assert same == (path == first)
    assert not any(m._forward_pre_hooks for m in model.get_submodule(first).modules())
    convfusion.revert(pipe)
    with pytest.raises(ConvFusionError, match="not converted"):
        start_from_attention(pipe, data)


def test_it_starts_closer_to_the_teacher():
    """On the embedded model, where attention matters: the mean map is better than uniform."""
    from convfusion import mini
    from convfusion.demo import error, spread

    pipe, held_out = mini.load_teacher(), spread(mini.held_out_data(), 4)
    convfusion.convert(pipe, uniform(DeltaConv(7, ratio=2.0, init="mean_zero")))
    before = error(pipe, held_out)
    start_from_attention(pipe, mini.training_data(), pictures=8)
    assert error(pipe, held_out) < 0.9 * before
