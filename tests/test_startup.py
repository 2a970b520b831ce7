"""Blocks that start as the mean of the attention they replace."""

import itertools
from typing import get_args

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_pipelines import PIPELINES

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.data import LatentDataset
from convfusion.distill.startup import draw_noised_batches
from convfusion.families import denoiser_of, list_sites
from convfusion.mixers import Depthwise
from convfusion.mixers.delta_conv import Gate
from convfusion.mixers.delta_conv_start import leading_directions, set_to_mean_attention
from convfusion.mixers.offsets import OffsetMeans, choose_queries, mean_offsets, offset_means
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
    away = torch.tensor([1, 0, 1])
    share = (1 - away / 5)[:, None] * (1 - away / 6)
    set_to_mean_attention(block, attention, OffsetMeans(kernels, share, torch.zeros(heads)))
    x = torch.randn(2, 30, channels)
    values = (x @ attention.to_v.weight.T).unflatten(-1, (heads, -1))  # the bias comes at the end
    mean = values.mean(dim=1)
    mixed = torch.zeros_like(values)
    for head in range(heads):
        a = kernels[head].float()
        for row in range(5):
            for column in range(6):
                token = row * 6 + column
                mixed[:, token, head] = (1 - (a * share).sum()) * mean[:, head]
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
    beyond = torch.zeros(3, dtype=torch.float64)
    for q in range(35):
        for k in range(35):
            i, j = k // 7 - q // 7 + radius, k % 7 - q % 7 + radius
            if 0 <= i < 5 and 0 <= j < 5:
                sums[:, i, j] += maps[:, q, k]
                counts[i, j] += 1
            else:
                beyond += maps[:, q, k] / 35
    found = offset_means(query, key, 0.5, grid, (radius, radius), torch.arange(35))
    assert torch.allclose(found.kernels, sums / counts, atol=1e-6)
    assert torch.allclose(found.share, counts.double() / 35)
    assert torch.allclose(found.outside(), beyond, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (8, 8), (5, 2), (1, 1), (20, 16)])
@pytest.mark.parametrize("side", [3, 7, 13])
@torch.no_grad()
def test_uniform_attention_leaves_the_mean_branch_what_no_window_holds(grid, side):
    """Counted one by one, whether all queries are looked at or only some of a large grid."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    held = [max(abs(a - c), abs(b - d)) <= side // 2 for a, b in places for c, d in places]
    zeros = torch.zeros(2, len(places), 4)
    chosen = choose_queries(len(places), 64)
    means = offset_means(zeros, zeros, 1.0, grid, [side // 2] * 2, chosen)
    expected = 1 - sum(held) / len(held)
    assert means.outside().tolist() == pytest.approx([expected] * 2, abs=1e-6)
    attention = attention_with_bias(8, 2)
    attention.to_q.weight.zero_()
    attention.to_q.bias.zero_()
    block = DeltaConv(side, ratio=2.0).build(8)
    block.init_from(attention)
    set_to_mean_attention(block, attention, means)
    whole = attention.to_out[0].weight @ attention.to_v.weight
    assert torch.allclose(block.mean_proj.weight, expected * whole, atol=1e-6)
    tokens = torch.randn(2, len(places), 8) + 1
    target = attention(tokens)
    missed = (block(tokens, grid) - target).square().sum() / target.square().sum()
    assert missed < (1e-10 if all(held) else 0.2)


@torch.no_grad()
def test_pictures_of_several_grids_count_alike():
    """A small grid says nothing of offsets beyond it, and each grid has its own borders."""
    torch.manual_seed(2)
    found = []
    for grid in ((4, 4), (8, 8), (3, 9)):
        tokens = grid[0] * grid[1]
        query, key = torch.randn(2, 2, tokens, 4)
        found.append(offset_means(query, key, 0.5, grid, (3, 3), torch.arange(tokens)))
    means = mean_offsets(found)
    beyond = torch.stack([each.outside() for each in found])
    assert beyond[0].abs().max() < 1e-6  # the window reaches across 4×4
    assert torch.allclose(means.outside(), beyond.mean(0))
    assert torch.allclose(means.kernels[:, 0, 0], _only_of(found[:2])), "3×9 has no such offset"
    alike = mean_offsets([found[0]] * 3)
    assert torch.allclose(alike.kernels, found[0].kernels)
    assert mean_offsets([found[2]]).kernels[:, 0].abs().max() == 0  # and nothing is divided by 0


def _only_of(found):
    """The mean at the first offset over the queries of some grids that have it."""
    weights = torch.stack([each.share[0, 0] for each in found])
    values = torch.stack([each.kernels[:, 0, 0] for each in found])
    return (weights[:, None] * values).sum(0) / weights.sum()


def test_a_window_over_the_whole_grid_leaves_nothing_to_the_mean_branch():
    """The embedded model's middle site has 4×4 tokens, which a kernel of 7 covers; no other is."""
    from convfusion import mini

    pipe = mini.load_teacher()
    convfusion.convert(pipe, uniform(DeltaConv(7)))
    calls = draw_noised_batches(pipe, mini.training_data(), pictures=2)
    convfusion.start_from_attention(pipe, calls)
    sizes = {p: m.mean_proj.weight.abs().max().item() for p, m in mixers_of(pipe).items()}
    (middle,) = [path for path in sizes if path.startswith("mid_block")]
    assert sizes.pop(middle) < 1e-5
    assert min(sizes.values()) > 1e-3


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_family_starts_from_its_attention(kind):
    pipe = PIPELINES[kind]()
    model = denoiser_of(pipe)
    side = model.config.sample_size
    data = LatentDataset(torch.randn(4, 4, side, side), ["red", "green", "apple", ""])
    if kind == "dit":
        data = LatentDataset(data.latents, ["red", "green", "apple", "3"])
    first = list_sites(model)[0].path
    convfusion.convert(pipe, convfusion.ConvertConfig({first: Depthwise(), "*": DeltaConv(3)}))
    before = {
        p: {k: v.clone() for k, v in m.state_dict().items()} for p, m in mixers_of(pipe).items()
    }
    convfusion.start_from_attention(pipe, draw_noised_batches(pipe, data))
    for path, mixer in mixers_of(pipe).items():
        assert all(value.isfinite().all() for value in mixer.state_dict().values())
        same = all(torch.equal(v, before[path][k]) for k, v in mixer.state_dict().items())
        assert same == (path == first)
    assert not any(m._forward_pre_hooks for m in model.get_submodule(first).modules())
    convfusion.revert(pipe)
    with pytest.raises(ConvFusionError, match="not converted"):
        convfusion.start_from_attention(pipe, draw_noised_batches(pipe, data))


def test_it_starts_closer_to_the_teacher():
    """On the embedded model, where attention matters: the mean map is better than uniform."""
    from convfusion import mini
    from convfusion.demo import measure_error, spread

    pipe, held_out = mini.load_teacher(), spread(mini.held_out_data("choice"), 4)
    convfusion.convert(pipe, uniform(DeltaConv(7, ratio=2.0, init="mean_zero")))
    before = measure_error(pipe, held_out)
    calls = draw_noised_batches(pipe, mini.training_data(), pictures=8)
    convfusion.start_from_attention(pipe, calls)
    assert measure_error(pipe, held_out) < 0.9 * before


@pytest.mark.parametrize("first_frame", [False, True])
@torch.no_grad()
def test_a_video_block_is_the_mean_of_an_attention_that_separates(first_frame):
    """Near keys by a kernel along the frames times one within them; the rest evenly, or first."""
    channels, heads, grid = 8, 2, (4, 3, 5)
    attention = attention_with_bias(channels, heads)
    block = DeltaConv(3, ratio=2.0, frame_kernel_size=3, first_frame_branch=first_frame)
    block = block.build(channels)
    block.init_from(attention)
    across, within = torch.rand(heads, 3) / 3, torch.rand(heads, 3, 3) / 9
    kernels = (across[:, :, None, None] * within[:, None]).double()
    share = (1 - torch.tensor([1, 0, 1]) / 4)[:, None, None]
    share = share * (1 - torch.tensor([1, 0, 1]) / 3)[:, None] * (1 - torch.tensor([1, 0, 1]) / 5)
    means = OffsetMeans(kernels, share, torch.zeros(heads))
    outside = means.outside().float()
    excess = outside / 2 if first_frame else torch.zeros(heads)
    means = means._replace(first=excess + (outside - excess) / 4)
    set_to_mean_attention(block, attention, means, frames=4)
    x = torch.randn(2, 60, channels)
    values = (x @ attention.to_v.weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = torch.zeros(heads, 60, 60)
    places = list(itertools.product(range(4), range(3), range(5)))
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        offset = [n - m + 1 for m, n in zip(a, b, strict=True)]
        if all(0 <= each <= 2 for each in offset):
            weights[:, i, j] = kernels[:, offset[0], offset[1], offset[2]].float()
    weights += ((outside - excess) / 60)[:, None, None]
    weights[..., :15] += (excess / 15)[:, None, None]
    mixed = (weights @ values).transpose(1, 2).flatten(2) + attention.to_v.bias
    assert torch.allclose(block(x, grid), attention.to_out[0](mixed), atol=1e-5)


@torch.no_grad()
def test_offsets_of_a_video_and_its_first_frame():
    torch.manual_seed(1)
    grid, radii = (3, 4, 3), (1, 0, 1)
    query, key = torch.randn(2, 2, 36, 4)
    maps = torch.softmax(query @ key.transpose(1, 2), dim=-1)
    found = offset_means(query, key, 1.0, grid, radii, torch.arange(36))
    assert found.kernels.shape == (2, 3, 1, 3)
    places = list(itertools.product(*map(range, grid)))
    first, same = torch.zeros(2), []
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        near = all(abs(m - n) <= most for m, n, most in zip(a, b, radii, strict=True))
        if b[0] == 0 and not near:
            first += maps[:, i, j] / 36
        if (b[0] - a[0], b[1] - a[1], b[2] - a[2]) == (1, 0, -1):
            same.append(maps[:, i, j])
    torch.testing.assert_close(found.first.float(), first)
    torch.testing.assert_close(found.kernels[:, 2, 0, 0].float(), torch.stack(same).mean(0))
