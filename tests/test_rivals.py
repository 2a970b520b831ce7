"""The rival mixers against their equations, written out."""

import math

import pytest
import tomesd.merge
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CASES, PLAIN, run

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.mixers import (
    MIXERS,
    Circular,
    Depthwise,
    GeneralisedLinear,
    Neighbourhood,
    Pooled,
    ToMe,
)
from convfusion.mixers.merging import match
from convfusion.mixers.windows import circular_attention

GRIDS = [(4, 6), (5, 3), (7, 7), (1, 5)]
CHANNELS, HEADS, HEAD = 8, 2, 4


def tokens_on(grid, batch=2):
    return torch.randn(batch, grid[0] * grid[1], CHANNELS)


def assert_same_with_gradients(found, expected, inputs):
    """Equal outputs, and equal gradients of a weighted sum of them."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def heads_apart(tensor):
    """[B, N, C] → a [B, N, d] for each head."""
    return tensor.split(HEAD, dim=-1)


def dense_attention(mixer, tokens, keys):
    """The attention of tokens to keys, head by head, from its definition."""
    query, key, value = mixer.to_q(tokens), mixer.to_k(keys), mixer.to_v(keys)
    mixed = [
        ((q @ k.transpose(1, 2)) / math.sqrt(HEAD)).softmax(-1) @ v
        for q, k, v in zip(*map(heads_apart, (query, key, value)), strict=True)
    ]
    return mixer.to_out(torch.cat(mixed, dim=-1))


@pytest.mark.parametrize("grid", GRIDS)
def test_generalised_linear_attention_token_by_token(grid):
    mixer = GeneralisedLinear().build(CHANNELS, HEADS)
    tokens = tokens_on(grid).requires_grad_()

    def bent(layers):
        first, norm, _, second = layers
        hidden = F.layer_norm(first(tokens), (CHANNELS,), norm.weight, norm.bias)
        return second(torch.where(hidden > 0, hidden, 0.01 * hidden))

    def phi(u):
        return torch.where(u > 0, u + 1, u.exp())

    query = phi(mixer.to_q(tokens + bent(mixer.f_q)))
    key = phi(mixer.to_k(tokens + bent(mixer.f_k)))
    mixed = []
    for q, k, v in zip(*map(heads_apart, (query, key, mixer.to_v(tokens))), strict=True):
        out = []
        for i in range(tokens.shape[1]):
            weights = (q[:, i : i + 1] * k).sum(-1)  # of every token j, not below zero
            share = weights / (weights.sum(1, keepdim=True) + 1e-4 * weights.shape[1])
            out.append((share[..., None] * v).sum(1))
        mixed.append(torch.stack(out, dim=1))
    expected = mixer.to_out(torch.cat(mixed, dim=-1))
    assert_same_with_gradients(mixer(tokens, grid), expected, (tokens, *mixer.parameters()))


@settings(deadline=None, max_examples=30)
@given(
    grid=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    radius=st.integers(1, 9),
    common=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_circular_attention_equals_a_dense_mask(grid, radius, common, seed):
    torch.manual_seed(seed)
    height, width = grid
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 2, height * width, 4)]
    shared = [t.requires_grad_() for t in torch.randn(2, 2, 2, common, 4)]
    place = torch.stack(
        torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1
    ).reshape(-1, 2)
    distance = (place[:, None] - place[None]).square().sum(-1)
    mask = F.pad(distance < radius**2, (0, common), value=True)
    query, key, value = inputs
    expected = F.scaled_dot_product_attention(
        query,
        torch.cat([key, shared[0]], dim=2),
        torch.cat([value, shared[1]], dim=2),
        attn_mask=mask,
    )
    found = circular_attention(
        query, key, value, grid, radius, common=tuple(shared) if common else None
    )
    assert_same_with_gradients(found, expected, [*inputs, *(shared if common else ())])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_circle_of_one_token_leaves_itself_and_the_mean(grid):
    mixer = Circular(radius=1).build(CHANNELS, HEADS)
    tokens = tokens_on(grid).requires_grad_()
    mean = tokens.mean(dim=1)
    rows = []
    for i in range(tokens.shape[1]):
        pair = torch.stack([tokens[:, i], mean], dim=1)
        rows.append(dense_attention(mixer, tokens[:, i : i + 1], pair))
    assert_same_with_gradients(mixer(tokens, grid), torch.cat(rows, dim=1), (tokens,))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pooled_keys_are_means_of_what_a_window_holds(grid, factor):
    height, width = grid
    mixer = Pooled(factor).build(CHANNELS, HEADS)
    tokens = tokens_on(grid).requires_grad_()
    maps = tokens.unflatten(1, grid)
    pooled = [
        maps[:, top : top + factor, left : left + factor].mean(dim=(1, 2))
        for top in range(0, height, factor)
        for left in range(0, width, factor)
    ]
    expected = dense_attention(mixer, tokens, torch.stack(pooled, dim=1))
    assert_same_with_gradients(mixer(tokens, grid), expected, (tokens,))


@pytest.mark.parametrize("grid", GRIDS)
def test_depthwise_is_a_sum_over_the_window(grid):
    height, width = grid
    mixer = Depthwise(3).build(CHANNELS, HEADS)
    tokens = tokens_on(grid).requires_grad_()
    padded = F.pad(mixer.to_v(tokens).unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    kernel = mixer.conv.weight[:, 0]
    mixed = sum(
        padded[:, i : i + height, j : j + width] * kernel[:, i, j]
        for i in range(3)
        for j in range(3)
    )
    expected = mixer.to_out(mixed.flatten(1, 2))
    assert_same_with_gradients(mixer(tokens, grid), expected, (tokens, *mixer.parameters()))


def merged_by_tomesd(tokens, grid, ratio, stride):
    height, width = grid
    count = int(tokens.shape[1] * ratio)
    return tomesd.merge.bipartite_soft_matching_random2d(
        tokens, width, height, stride, stride, count, no_rand=True
    )


def in_order(tokens):
    """The tokens of each sample by their first channel."""
    order = tokens[..., :1].argsort(dim=1)
    return tokens.gather(1, order.expand_as(tokens))


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (5, 7), (7, 3), (8, 8)])
@pytest.mark.parametrize(("ratio", "stride"), [(0.25, 2), (0.5, 2), (0.75, 2), (0.6, 3)])
def test_merging_equals_the_authors_own(grid, ratio, stride):
    tokens = tokens_on(grid)
    merge, unmerge = merged_by_tomesd(tokens, grid, ratio, stride)
    ours = match(tokens, grid, ratio, stride)
    found, expected = ours.merge(tokens), merge(tokens)
    torch.testing.assert_close(in_order(found), in_order(expected))  # theirs is not stable
    torch.testing.assert_close(ours.unmerge(found), unmerge(expected))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (7, 3)])
def test_tome_is_attention_between_merged_tokens(grid):
    mixer = ToMe(0.5).build(CHANNELS, HEADS)
    tokens = tokens_on(grid).requires_grad_()
    merge, unmerge = merged_by_tomesd(tokens, grid, 0.5, 2)
    expected = unmerge(dense_attention(mixer, merge(tokens), merge(tokens)))
    assert_same_with_gradients(mixer(tokens, grid), expected, (tokens,))


def test_nothing_is_merged_where_no_region_fits():
    mixer = ToMe(0.5).build(CHANNELS, HEADS)
    for grid in ((1, 5), (1, 1)):
        tokens = tokens_on(grid)
        torch.testing.assert_close(mixer(tokens, grid), dense_attention(mixer, tokens, tokens))


WHOLE = [Pooled(1), ToMe(0.0), Circular(100, mean_token=False), Neighbourhood(41)]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
@pytest.mark.parametrize("mixer", WHOLE, ids=lambda mixer: type(mixer).__name__)
@torch.no_grad()
def test_at_its_limit_a_mixer_is_the_models_own_attention(case, mixer):
    model = case.model()
    height, width = case.sizes[0]
    stock = run(model, case, height, width)
    convfusion.convert(model, uniform(mixer))
    torch.testing.assert_close(run(model, case, height, width), stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(MIXERS) - {"removed"}))
def test_gradients_reach_every_tensor(kind):
    mixer = MIXERS[kind]().build(CHANNELS, HEADS)
    grid = (5, 9)  # larger than any of their windows
    mixer(tokens_on(grid), grid).square().sum().backward()
    softmax = kind in ("neighbourhood", "circular", "pooled", "tome")
    for name, parameter in mixer.named_parameters():
        if softmax and name == "to_k.bias":
            continue  # adds the same to all scores of a query, which a softmax does not see
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


def test_a_local_mean_is_where_depthwise_starts():
    case = CASES[3]
    attention = case.model().transformer_blocks[0].attn1
    mixer = Depthwise(3).build(16, 2)
    mixer.init_from(attention)
    maps = torch.randn(1, 16, 7, 9)
    with torch.no_grad():
        inner = mixer(maps.flatten(2).transpose(1, 2), (7, 9)).unflatten(1, (7, 9))[:, 1:-1, 1:-1]
        means = F.avg_pool2d(maps, 3, stride=1).permute(0, 2, 3, 1)
        expected = attention.to_out[0](attention.to_v(means))
    torch.testing.assert_close(inner, expected)


def test_parts_of_the_block_are_settings():
    tokens = tokens_on((6, 5))
    whole = DeltaConv(3).build(CHANNELS)
    alone = DeltaConv(3, mean_branch=False).build(CHANNELS)
    alone.load_state_dict({k: v for k, v in whole.state_dict().items() if "mean_proj" not in k})
    mean = whole.mean_proj(tokens.mean(dim=1, keepdim=True))
    torch.testing.assert_close(alone(tokens, (6, 5)) + mean, whole(tokens, (6, 5)))
    single = DeltaConv(3, stages=1).build(CHANNELS)
    assert len(single.convs) == 1
    assert single.proj_out.in_features * 2 == whole.proj_out.in_features


MISTAKES = {
    "radius must be at least 1": lambda: Circular(0),
    "mean_token must be bool": lambda: Circular(8, mean_token=1),
    "factor must be at least 1": lambda: Pooled(0),
    "factor must be int": lambda: Pooled(2.0),
    "kernel_size must be odd": lambda: Depthwise(4),
    "stride must be at least 2": lambda: ToMe(0.5, stride=1),
    r"1 − 1/stride² = 0\.75, not 0\.8": lambda: ToMe(0.8),
    r"1 − 1/stride² = 0\.75, not -0\.1": lambda: ToMe(-0.1),
    "3 heads do not divide 16": lambda: GeneralisedLinear().build(16, 3),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ConvFusionError, match=message):
        MISTAKES[message]()
