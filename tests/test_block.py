"""The ΔConvBlock against its equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from convfusion import ConvFusionError, DeltaConv, DeltaConvBlock
from convfusion.ops.reference import apply_gate, halve, shrink

odd = st.integers(0, 10).map(lambda k: 2 * k + 1)


def depthwise(maps: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Zero-padded depthwise correlation by shifted sums, [B, C, H, W] with [C, 1, K, K]."""
    reach = kernel.shape[-1] // 2
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (reach,) * 4)
    total = torch.zeros_like(maps)
    for i in range(kernel.shape[-1]):
        for j in range(kernel.shape[-1]):
            total += kernel[:, 0, i, j, None, None] * padded[..., i : i + height, j : j + width]
    return total


def halve_by_hand(maps: torch.Tensor) -> torch.Tensor:
    height, width = maps.shape[-2:]
    rows = [
        torch.stack(
            [maps[..., i : i + 2, j : j + 2].mean((-2, -1)) for j in range(0, width, 2)], -1
        )
        for i in range(0, height, 2)
    ]
    return torch.stack(rows, -2)


def by_hand(block: DeltaConvBlock, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The module's equations, written out with loops."""
    config = block.config
    maps = block.proj_in(tokens).permute(0, 2, 1).reshape(len(tokens), -1, *grid)
    inner, stages, pooled = maps.shape[1], [], maps
    for i, conv in enumerate(block.convs):
        if i and config.pooling == "ceil":
            pooled = halve_by_hand(pooled)
        elif i:
            sides = [max(1, side // 2**i) for side in grid]
            pooled = F.adaptive_avg_pool2d(maps, sides)
        mixed = depthwise(pooled, conv.weight)
        first, second = mixed[:, : inner // 2], mixed[:, inner // 2 :]
        gated = {
            "scaled": first * second / math.sqrt(inner),
            "reference": first * second * math.sqrt(inner / 2),
            "sigmoid": first * torch.sigmoid(second),
        }[config.gate]
        stages.append(F.interpolate(gated, grid, mode="bilinear", align_corners=False))
    joined = torch.cat(stages, 1).flatten(2).permute(0, 2, 1)
    mixed = block.proj_out(joined)
    if config.mean_branch:
        mixed = mixed + block.mean_proj(tokens.mean(1, keepdim=True))
    return mixed


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    kernel=odd,
    stages=st.integers(1, 3),
    gate=st.sampled_from(["scaled", "reference", "sigmoid"]),
    pooling=st.sampled_from(["ceil", "adaptive"]),
    ratio=st.sampled_from([0.25, 0.5, 1.0]),
    mean_branch=st.booleans(),
)
def test_equals_its_equations(height, width, kernel, stages, gate, pooling, ratio, mean_branch):
    torch.manual_seed(height * 100 + width)
    block = DeltaConvBlock(8, DeltaConv(kernel, stages, ratio, gate, pooling, mean_branch)).double()
    tokens = torch.randn(2, height * width, 8, dtype=torch.double)
    output = block(tokens, (height, width))
    torch.testing.assert_close(output, by_hand(block, tokens, (height, width)))


@given(height=st.integers(1, 6), width=st.integers(1, 6))
def test_poolings_agree_on_even_grids(height, width):
    maps = torch.randn(1, 2, 2 * height, 2 * width, dtype=torch.double)
    torch.testing.assert_close(halve(maps), shrink(maps, 2))


def test_poolings_differ_on_odd_grids():
    maps = torch.randn(1, 2, 5, 7)
    assert halve(maps).shape[-2:] == (3, 4)
    assert shrink(maps, 2).shape[-2:] == (2, 3)


def test_grid_must_hold_the_tokens():
    block = DeltaConvBlock(8)
    with pytest.raises(ValueError, match=r"N = 20 tokens, but the grid 4×6 has 24"):
        block(torch.randn(1, 20, 8), (4, 6))


def test_grid_orientation_matters():
    block = DeltaConvBlock(8, DeltaConv(kernel_size=3))
    tokens = torch.randn(1, 24, 8)
    assert not torch.allclose(block(tokens, (4, 6)), block(tokens, (6, 4)))


@pytest.mark.parametrize("channels", [640, 1280])
def test_half_precision_gate_holds_large_inputs(channels):
    signs = torch.randint(0, 2, (2, channels, 8, 8)) * 2 - 1
    maps = signs * (1e3 - 50 * torch.rand(signs.shape))
    exact = apply_gate(maps.half().float(), "scaled")
    half = apply_gate(maps.half(), "scaled").float()
    assert half.isfinite().all()
    assert ((half - exact).abs() / exact.abs()).max() < 2e-3
    assert not apply_gate(maps.half(), "reference").isfinite().all()  # why `scaled` is the default


def test_half_precision_block_follows_full_precision():
    """Gate inputs of ±1e3 at C = 1280: an identity kernel lets proj_in decide them."""
    block = DeltaConvBlock(1280, DeltaConv(kernel_size=3, mean_branch=False))
    with torch.no_grad():
        nn.init.zeros_(block.proj_in.weight)
        signs = torch.randint(0, 2, block.proj_in.bias.shape) * 2 - 1
        block.proj_in.bias.copy_(1e3 * signs)
        for conv in block.convs:
            conv.weight.zero_()[:, :, 1, 1] = 1
        nn.init.eye_(block.proj_out.weight).mul_(1.0)
        nn.init.zeros_(block.proj_out.bias)
    tokens = torch.randn(1, 16, 1280)
    exact = block(tokens, (4, 4))
    half = block.half()(tokens.half(), (4, 4)).float()
    assert half.isfinite().all()
    assert (half - exact).norm() / exact.norm() < 2e-3


def test_compiles_whole_and_follows_sizes():
    block = DeltaConvBlock(8, DeltaConv(kernel_size=5))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for grid in ((4, 6), (6, 4), (5, 7)):
        tokens = torch.randn(2, grid[0] * grid[1], 8)
        torch.testing.assert_close(compiled(tokens, grid), block(tokens, grid))


def test_gradient_checkpointing_gives_the_same_gradients():
    block = DeltaConvBlock(8)
    tokens = torch.randn(2, 30, 8, requires_grad=True)
    plain = torch.autograd.grad(block(tokens, (5, 6)).square().sum(), list(block.parameters()))
    output = checkpoint(block, tokens, (5, 6), use_reentrant=False)
    replayed = torch.autograd.grad(output.square().sum(), list(block.parameters()))
    for one, other in zip(plain, replayed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels, ratio", [(6, 0.5), (8, 0.3), (2, 0.5)])
def test_channels_must_split(channels, ratio):
    with pytest.raises(ConvFusionError, match="even integer"):
        DeltaConvBlock(channels, DeltaConv(ratio=ratio))


def test_mean_branch_starts_as_uniform_attention():
    from diffusers.models.attention_processor import Attention

    attention = Attention(query_dim=16, heads=2, dim_head=8, bias=True)
    nn.init.zeros_(attention.to_q.weight)
    nn.init.zeros_(attention.to_q.bias)
    block = DeltaConvBlock(16, DeltaConv(init="mean_zero"))
    block.init_from(attention)
    tokens = torch.randn(2, 30, 16)
    torch.testing.assert_close(block(tokens, (5, 6)), attention(tokens), rtol=1e-4, atol=1e-6)


class Copies(TorchDispatchMode):
    """Collects the operations that only copy a tensor of at least so many elements."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if name in ("clone", "copy_", "_to_copy", "contiguous") and out.numel() >= self.least:
            self.seen.append(name)
        return out


@pytest.mark.parametrize("pooling", ["ceil", "adaptive"])
def test_tokens_become_maps_and_tokens_again_without_a_copy(pooling):
    block = DeltaConv(kernel_size=5, stages=3, pooling=pooling).build(16)
    tokens = torch.randn(2, 12 * 8, 16)
    with torch.no_grad(), Copies(tokens.numel() // 16) as copies:
        block(tokens, (12, 8))
    assert not copies.seen
