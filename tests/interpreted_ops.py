"""Every kernel against the reference, by Triton's interpreter: `test_ops.py` runs this file.

Apart from the other tests, since TRITON_INTERPRET=1 must stand before Triton is imported and stays
for the life of a process.
"""

import copy
import mmap

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from convfusion import DeltaConv, DeltaConvBlock
from convfusion.ops import kernels, launch, library, reference
from convfusion.ops.tile_sizes import Tile

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
BOUND = {FULL: 2e-6, HALF: 2e-3, BRAIN: 2e-2}  # of the error's norm, relative
SMALL = Tile(4, 2, 16)  # an interpreted tile costs by its columns


@pytest.fixture(params=[SMALL], ids=["small"], autouse=True)
def tile(request, monkeypatch):
    """Tiles of another size than the usual, unless None."""
    if request.param is not None:
        monkeypatch.setattr(launch, "choose_tile", lambda kernel, channels: request.param)


@pytest.fixture(autouse=True)
def _unwritten_is_nan():
    """Under this switch fresh memory is NaN: whatever no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(grid, kernel, stages, dtype, channels=6, batch=1):
    tokens = torch.randn(batch, grid[0] * grid[1], channels).to(dtype)
    weights = [(torch.randn(channels, 1, kernel, kernel) / kernel).to(dtype) for _ in range(stages)]
    return tokens, weights


def gradients(function, tokens, weights, grid, gate, grad=None):
    """Output, and gradients of tokens and weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (tokens, *weights)]
    out = function(leaves[0], leaves[1:], grid, gate)
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_matches(found, expected, bound):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        error = one.double() - other
        assert error.norm() <= bound * other.norm()
        assert error.abs().max() <= 3 * bound * other.abs().max()


def check(grid, kernel, stages, gate, dtype, **shape):
    tokens, weights = problem(grid, kernel, stages, dtype, **shape)
    half = tokens.shape[-1] // 2
    grad = torch.randn(*tokens.shape[:2], half * stages).to(dtype)
    found = gradients(library.pyramid, tokens, weights, grid, gate, grad)
    assert all(tensor.dtype == dtype for tensor in found)
    exact = [tensor.double() for tensor in (tokens, *weights)]
    expected = gradients(reference.pyramid_of_tokens, exact[0], exact[1:], grid, gate, grad)
    assert_matches(found, expected, BOUND[dtype])
    return tokens, weights, grad, found


@pytest.mark.parametrize(
    "grid, kernel, stages, gate, dtype",
    [
        ((5, 7), 3, 2, "scaled", FULL),
        ((6, 3), 3, 3, "reference", HALF),
        ((1, 1), 3, 3, "sigmoid", FULL),
        ((7, 1), 5, 2, "sigmoid", BRAIN),
        ((1, 5), 5, 3, "reference", FULL),
        ((5, 3), 7, 2, "sigmoid", HALF),
        ((4, 3), 7, 1, "scaled", BRAIN),
        ((3, 4), 13, 2, "scaled", HALF),
        ((2, 3), 13, 1, "sigmoid", FULL),
        ((3, 2), 21, 1, "reference", FULL),
        ((5, 4), 1, 2, "scaled", FULL),
    ],
)
def test_kernels_equal_the_reference(grid, kernel, stages, gate, dtype):
    """Odd, long, smaller than the kernel, one token wide; forward and both gradients."""
    check(grid, kernel, stages, gate, dtype)


@pytest.mark.parametrize("tile", [None], ids=["usual tile"], indirect=True)
@pytest.mark.parametrize("grid, kernel, stages", [((5, 6), 3, 2), ((2, 9), 5, 1)])
def test_usual_tiles(grid, kernel, stages, tile):
    check(grid, kernel, stages, "scaled", FULL)


@pytest.mark.parametrize("channels", [2, 36])
def test_channels_need_not_fill_their_blocks(channels):
    check((3, 2), 3, 2, "scaled", FULL, channels=channels)


def test_same_bits_twice_and_whatever_the_chunks_hold(monkeypatch):
    """The partial sums of the weights' gradient: several chunks, the last one shorter."""
    monkeypatch.setattr(
        launch, "choose_chunks", lambda groups, kernel, blocks: (-(-groups // 3), 3)
    )
    tokens, weights, grad, found = check((6, 2), 3, 1, "scaled", FULL, batch=2)  # 4 groups
    again = gradients(library.pyramid, tokens, weights, (6, 2), "scaled", grad)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_gate_holds_large_halves():
    """500 in float16: the product overflows, its scaled value does not."""
    tokens = torch.full((1, 2, 64), 500.0, dtype=HALF)
    weights = [torch.ones(64, 1, 1, 1, dtype=HALF)]
    found = library.pyramid(tokens, weights, (1, 2), "scaled")
    assert torch.allclose(found.double(), torch.tensor(500**2 / 64**0.5).double(), rtol=1e-3)


def test_operations_are_registered_properly():
    tokens, packed = torch.randn(1, 2, 4, requires_grad=True), torch.randn(2, 1, 4)
    torch.library.opcheck(
        library.pyramid_op, (tokens, packed.clone().requires_grad_(), 1, 2, "scaled")
    )
    grad = torch.randn(1, 2, 4)
    for wanted in (True, False):
        args = (grad, tokens.detach(), packed, 1, 2, "scaled", wanted)
        torch.library.opcheck(library.pyramid_backward_op, args)


def test_an_empty_batch_passes():
    weights = [torch.randn(6, 1, 3, 3)]
    found = gradients(library.pyramid, torch.empty(0, 6, 6), weights, (2, 3), "scaled")
    assert found[0].shape == (0, 6, 3) and not found[2].any()


def test_frozen_weights_cost_no_gradient():
    tokens, weights = problem((1, 3), 3, 1, FULL)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((str(function), args))
            return function(*args, **(kwargs or {}))

    with Watch():
        library.pyramid(tokens.requires_grad_(), weights, (1, 3), "scaled").sum().backward()
    args = next(args for name, args in seen if "pyramid_backward" in name)
    assert args[-1] is False and tokens.grad.any()


# The block

GRID = (3, 2)


def block_and_tokens():
    block = DeltaConvBlock(8, DeltaConv(kernel_size=3))
    return block, torch.randn(1, GRID[0] * GRID[1], 8, requires_grad=True)


def through(block, tokens):
    """Output and gradients."""
    out = block(tokens, GRID)
    return [out, *torch.autograd.grad(out.square().sum(), [tokens, *block.parameters()])]


def test_block_gives_the_same_compiled_copied_checkpointed_and_by_plain_pytorch(monkeypatch):
    block, tokens = block_and_tokens()
    expected = through(block, tokens)
    replayed = checkpoint(copy.deepcopy(block), tokens, GRID, use_reentrant=False)
    assert torch.equal(replayed, expected[0])
    assert torch.equal(torch.autograd.grad(replayed.square().sum(), tokens)[0], expected[1])

    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = through(torch.compile(block, fullgraph=True, backend=backend), tokens)
    assert len(graphs) == 1 and torch.ops.convfusion.pyramid.default in graphs[0]
    monkeypatch.setattr(library, "AVAILABLE", False)
    for one, other, plain in zip(expected, compiled, through(block, tokens), strict=True):
        torch.testing.assert_close(other, one)
        torch.testing.assert_close(plain, one)


def test_block_leaves_other_work_to_its_modules(monkeypatch):
    """Adaptive pooling, float64, a stage that is no plain convolution."""
    monkeypatch.setattr(library, "pyramid_op", None)
    tokens = torch.randn(1, 15, 8)
    DeltaConvBlock(8, DeltaConv(pooling="adaptive"))(tokens, (3, 5))
    DeltaConvBlock(8).double()(tokens.double(), (3, 5))
    wrapped = DeltaConvBlock(8)
    wrapped.convs[1] = torch.nn.Sequential(wrapped.convs[1])
    wrapped(tokens, (3, 5))


def test_autocast_weights_follow_the_tokens():
    block, tokens = block_and_tokens()
    with torch.autocast("cpu", BRAIN):
        found = through(block, tokens)
    assert found[0].dtype == BRAIN and all(grad.dtype == FULL for grad in found[1:])
    assert_matches(found, [t.double() for t in through(block, tokens)], 3e-2)


# Offsets beyond 2^31

FAR = 2**30  # elements between two pixels
SEEN = 16  # channels that a program looks at


NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on


class Huge:
    """A map of three pixels 2^30 elements apart, in memory that is only there where touched."""

    def __init__(self, *values):
        lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        self.memory = mmap.mmap(-1, 3 * FAR * 2, lazily)
        self.numbers = np.frombuffer(self.memory, np.float16)
        # The interpreter copies the tensor that it is given, so that one is short.
        self.tensor = torch.frombuffer(self.memory, dtype=HALF, count=SEEN)
        for pixel, (first, second) in enumerate(values):
            self.numbers[pixel * FAR : pixel * FAR + SEEN] = first
            self.numbers[pixel * FAR + FAR // 2 : pixel * FAR + FAR // 2 + SEEN] = second

    def __getitem__(self, pixel):
        """The first channel of each half."""
        return [float(self.numbers[pixel * FAR + half]) for half in (0, FAR // 2)]


def launched(kernel, programs, *args, **constants):
    kernel[programs](*args, C=FAR, **constants)


TILE = {"KERNEL": 1, "ROWS": 2, "COLS": 4, "CHANNELS": SEEN}


@pytest.fixture
def huge():
    """Three pixels in a row, whose third lies at 2^31 elements."""
    return Huge((1, 2), (3, 4), (5, 6))


def test_far_offsets_of_the_stage(huge):
    weights, out, pooled = Huge((2, 3)), Huge(), Huge()
    launched(
        kernels.conv_gate, (1, 1), huge.tensor, weights.tensor, out.tensor, pooled.tensor, 0.5,
        1, 3, OUT_STRIDE=FAR, SIGMOID=False, POOL=True, **TILE,
    )  # fmt: skip
    assert [out[p][0] for p in range(3)] == [2 * a * 3 * b / 2 for a, b in ((1, 2), (3, 4), (5, 6))]
    assert [pooled[0], pooled[1]] == [[2, 3], [5, 6]]


def test_far_offsets_of_the_gate_gradient(huge):
    weights, out, grad = Huge((2, 3)), Huge(), Huge((1, 0), (2, 0), (3, 0))
    launched(
        kernels.conv_gate_grad, (1, 1), huge.tensor, weights.tensor, grad.tensor, out.tensor, None,
        0.5, 1, 3, GRAD_STRIDE=FAR, SIGMOID=False, POOL=False, **TILE,
    )  # fmt: skip
    assert [out[p] for p in range(3)] == [[3, 1], [12, 6], [27, 15]]


def test_far_offsets_of_the_input_gradient(huge):
    weights, out, coarse = Huge((2, 0)), Huge(), Huge((2, 0), (4, 0))
    launched(
        kernels.conv_input_grad, (1, 1), huge.tensor, weights.tensor, coarse.tensor, out.tensor,
        1, 3, COARSE=True, **TILE,
    )  # fmt: skip
    assert [out[p][0] for p in range(3)] == [2 + 1, 6 + 1, 10 + 4]


def test_far_offsets_of_the_weight_gradient(huge):
    grad, partial = Huge((1, 0), (10, 0), (100, 0)), torch.zeros(SEEN)
    launched(
        kernels.conv_weight_grad, (1, 1, 1), huge.tensor, grad.tensor, partial, 1, 1, 1, 3, **TILE
    )
    assert partial.tolist() == [531.0] * SEEN


@pytest.mark.parametrize("kernel", ["upsample", "upsample_grad"])
def test_far_offsets_of_resizing(huge, kernel):
    out, last = Huge(), (2, 2) if kernel == "upsample_grad" else ()
    slice_of = "GRAD" if last else "OUT"
    launched(
        getattr(kernels, kernel), (1, 1), huge.tensor, out.tensor, 1, 3, 1, 3, 1.0, 1.0, *last,
        PIXELS=4, CHANNELS=SEEN, **{f"{slice_of}_STRIDE": FAR, f"{slice_of}_START": 0},
    )  # fmt: skip
    assert [out[p][0] for p in range(3)] == [1, 3, 5]
