"""Token mixers other than the ΔConvBlock."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convfusion import ConvFusionError
from convfusion.mixers import MIXERS, Neighbourhood
from convfusion.mixers.windows import neighbourhood_attention


def one_by_one(query, key, value, grid, window):
    """Each query over the keys of its own window, which moves inwards at the border."""
    height, width = grid
    tall, wide = min(window, height), min(window, width)
    out = torch.empty_like(query)
    for token in range(height * width):
        row, column = divmod(token, width)
        top = min(max(row - tall // 2, 0), height - tall)
        left = min(max(column - wide // 2, 0), width - wide)
        near = [r * width + c for r in range(top, top + tall) for c in range(left, left + wide)]
        one = query[:, :, token : token + 1]
        out[:, :, token : token + 1] = F.scaled_dot_product_attention(
            one, key[:, :, near], value[:, :, near]
        )
    return out


@settings(deadline=None, max_examples=30)
@given(
    grid=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    window=st.integers(0, 6).map(lambda half: 2 * half + 1),
    seed=st.integers(0, 999),
)
def test_neighbourhood_attention_equals_one_query_at_a_time(grid, window, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 2, grid[0] * grid[1], 4, generator=generator)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    found = neighbourhood_attention(query, key, value, grid, window)
    expected = one_by_one(query, key, value, grid, window)
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [
        torch.autograd.grad((out * value.detach()).sum(), (query, key, value), retain_graph=True)
        for out in (found, expected)
    ]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_settings_are_checked():
    for window in (0, 4, -3):
        with pytest.raises(ConvFusionError, match="window must be odd"):
            Neighbourhood(window)
    with pytest.raises(ConvFusionError, match="3 heads do not divide 16"):
        Neighbourhood(3).build(16, 3)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
def test_every_mixer_keeps_shape_and_dtype_on_any_grid(kind, grid):
    mixer = MIXERS[kind]().build(16, 2)
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        tokens = torch.ones(2, grid[0] * grid[1], 16, dtype=dtype, device=device)
        mixed = mixer.to(device, dtype)(tokens, grid)
        assert (mixed.shape, mixed.dtype) == (tokens.shape, dtype)
        assert mixed.device.type == device


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_checks_its_grid(kind):
    mixer = MIXERS[kind]().build(16, 2)
    with pytest.raises(ConvFusionError, match="N = 12"):
        mixer(torch.zeros(1, 12, 16), (3, 5))
