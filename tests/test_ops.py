"""The fused operation: who computes it, what it costs, its kernels by interpreter and compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import pyramid as bench
from convfusion import ConvFusionError, DeltaConv, DeltaConvBlock
from convfusion.ops import library, reference
from convfusion.ops.tile_sizes import CHANNELS, PROGRAMS, choose_block, choose_chunks, choose_tile

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


# The reference


@pytest.mark.parametrize("pooling", ["ceil", "adaptive"])
@pytest.mark.parametrize("gate", ["scaled", "reference", "sigmoid"])
@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (8, 4)])
def test_reference_is_the_blocks_pyramid(grid, gate, pooling):
    block = DeltaConvBlock(8, DeltaConv(3, 3, gate=gate, pooling=pooling)).double()
    tokens = torch.randn(2, grid[0] * grid[1], 4).double()
    found = reference.pyramid_of_tokens(tokens, block.list_stage_weights(), grid, gate, pooling)
    expected = (
        block.apply_pyramid(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(found, expected)


# Who computes it


def fake_cuda(*shape):
    return torch.empty(*shape, device="cuda")


@needs_triton
def test_cuda_tensors_meet_the_operation(monkeypatch):
    """Told by tensors that claim to be on a GPU and hold nothing."""
    monkeypatch.setattr(library, "WANTED", True)
    block = DeltaConvBlock(8)
    shapes = {name: value.shape for name, value in block.state_dict().items()}
    with FakeTensorMode():
        state = {name: fake_cuda(*shape) for name, shape in shapes.items()}
        call = torch.func.functional_call
        tokens, seen = fake_cuda(2, 15, 8), []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        with Watch():
            out = call(block, state, (tokens, (3, 5)))
        assert out.shape == tokens.shape and out.is_cuda
        assert "convfusion.pyramid.default" in seen and "aten.convolution.default" not in seen


@needs_triton
def test_the_rule(monkeypatch):
    with FakeTensorMode():
        cuda, weights = fake_cuda(1, 4, 8), [fake_cuda(8, 1, 3, 3)]
        assert not library.can_fuse(cuda, weights)  # not asked for
        monkeypatch.setattr(library, "WANTED", True)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert library.can_fuse(cuda.to(dtype), weights)
        assert not library.can_fuse(cuda.double(), weights)
        assert not library.can_fuse(cuda, weights, "adaptive")
        assert not library.can_fuse(cuda, [torch.empty(8, 1, 3, 3)])  # offloaded
        for device in ("cpu", "meta"):
            tokens = torch.empty(1, 4, 8, device=device)
            assert not library.can_fuse(tokens, [tokens])


def test_without_the_kernels_it_is_the_reference(monkeypatch):
    monkeypatch.setattr(library, "WANTED", True)
    monkeypatch.setattr(library, "AVAILABLE", False)
    with FakeTensorMode():
        assert not library.can_fuse(fake_cuda(1, 4, 8), [fake_cuda(8, 1, 3, 3)])
    tokens, weights = torch.randn(1, 6, 8), [torch.randn(8, 1, 3, 3)]
    found = library.pyramid(tokens, weights, (2, 3), "scaled")
    assert torch.equal(found, reference.pyramid_of_tokens(tokens, weights, (2, 3), "scaled"))


def test_importing_the_block_does_not_import_triton():
    code = "import sys, convfusion, convfusion.mixers; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_on_the_cpu_holds_plain_operators_only():
    block = DeltaConvBlock(8, DeltaConv(kernel_size=3)).eval()
    exported = torch.export.export(block, (torch.randn(1, 15, 8), (3, 5)))
    names = {str(node.target) for node in exported.graph.nodes}
    assert any("conv2d" in name for name in names)
    assert not any("convfusion" in name for name in names)


# What it costs


def test_the_counter_knows_the_operation():
    """As many operations as PyTorch counts in the convolutions of the plain path."""
    tokens = torch.empty(2, 35, 8, device="meta")
    weights = [torch.empty(8, 1, 5, 5, device="meta") for _ in range(3)]
    with FlopCounterMode(display=False) as plain:
        reference.pyramid_of_tokens(tokens, weights, (5, 7), "scaled")
    packed = torch.empty(3, 25, 8, device="meta")
    with FlopCounterMode(display=False, custom_mapping=library.FLOPS) as fused:
        library.pyramid_op(tokens, packed, 5, 7, "scaled")
    assert fused.get_total_flops() == plain.get_total_flops() > 0
    grad = torch.empty(2, 35, 12, device="meta")
    with FlopCounterMode(display=False, custom_mapping=library.FLOPS) as backward:
        library.pyramid_backward_op(grad, tokens, packed, 5, 7, "scaled", True)
    assert backward.get_total_flops() == 3 * plain.get_total_flops()


def test_bytes_of_one_stage_and_of_two():
    """By hand, in elements of one channel pair: C' = 2, so that maps and gated maps are 2 and 1."""
    one = bench.Case("", 1, 4, 4, 2, 1, 1)
    assert bench.forward_bytes(one, 1) == 32 + 16 + 2
    two = bench.Case("", 1, 4, 4, 2, 1, 2)
    assert bench.forward_bytes(two, 1) == (32 + 16 + 8) + (8 + 4) + (4 + 16) + 4
    gate, inputs, weights = 32 + 16 + 32, 64, 64
    assert bench.backward_bytes(one, 1) == gate + inputs + weights + 6
    coarse_gate, coarse_inputs, coarse_weights, resize = 8 + 4 + 8, 16, 16, 16 + 4
    assert bench.backward_bytes(two, 1) == (
        gate + 8 + inputs + 8 + weights + resize + coarse_gate + coarse_inputs + coarse_weights + 12
    )


def test_share_of_the_mean_that_the_page_gives():
    """In units of C a token: proj_in, pyramid, proj_out, mean, adding it."""
    case = bench.Case("", 4096, 64, 64, 32, 1, 2)  # so many that the weights do not count
    pyramid = bench.forward_bytes(case, 1) / (4096 * 64 * 64 * 2 * 32)
    assert pyramid == pytest.approx(1.375, abs=1e-6)
    assert 1 / (1.5 + pyramid + 1.5 + 1 + 2) == pytest.approx(0.1356, abs=1e-4)


def test_a_kernel_of_13_has_about_113_operations_a_byte():
    moved, operations = bench.work_of(bench.Case("", 8, 64, 64, 1152, 13, 1), 2, "forward")
    assert round(operations / moved) == 112  # 113 without the weights' own bytes
    assert bench.bound_of(moved, operations, copy=3e12, fp32=60e12) == "arithmetic"
    assert bench.bound_of(moved, operations, copy=1e11, fp32=60e12) == "memory"


# How the work is cut


@settings(deadline=None)
@given(
    groups=st.integers(1, 100_000),
    kernel=st.integers(0, 10).map(lambda half: 2 * half + 1),
    channels=st.integers(1, 5000),
)
def test_chunks_and_blocks_cover_the_work(groups, kernel, channels):
    tile = choose_tile(kernel, channels)
    blocks = -(-channels // tile.channels)
    assert tile.rows % 2 == tile.cols % 2 == 0 and blocks * tile.channels >= channels
    assert -channels % tile.channels == min(-channels % block for block in CHANNELS)
    assert tile.channels == choose_block(channels)
    chunks, each = choose_chunks(groups, kernel, blocks)
    assert (chunks - 1) * each < groups <= chunks * each
    assert chunks == groups or chunks * kernel * blocks < PROGRAMS + kernel * blocks


# The kernels


@needs_triton
def test_kernels_by_the_interpreter():
    """All of `interpreted_ops.py`, in a process where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "interpreted_ops.py"]
    ran = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout


@needs_triton
@pytest.mark.parametrize("grid, kernel", [((7, 9), 3), ((1, 1), 1)])
def test_kernels_compile_for_a_gpu(grid, kernel, tmp_path, monkeypatch):
    """For compute capability 9.0, from real launches; no kernel adds into memory of another.

    Sides of 1 are a case of their own: the launcher makes such arguments constants.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from compile_ahead import ENTRIES, compile_for, launches

    tokens = (2, grid[0] * grid[1], 96)
    found = launches(tokens, grid, kernel, 2, "sigmoid", torch.bfloat16)
    first = {launch.kernel: launch for launch in reversed(found)}
    assert set(first) == set(ENTRIES)
    for name, launch in first.items():
        compiled = compile_for(90, launch)
        assert compiled.stack == 0 and 0 < compiled.registers < 128, compiled
        assert "atomic" not in compiled.code
        stores = re.findall(r"tt\.store .* : tensor<[^>]*!tt\.ptr<(\w+)>", compiled.code)
        assert stores and set(stores) == {"f32" if name == "conv_weight_grad" else "bf16"}


@needs_cuda
@needs_triton
@pytest.mark.parametrize("case", bench.parity_cases()[::3], ids=str)
def test_parity_on_this_gpu(case):
    bench.check_parity(case, "float16")


# The benchmark


def test_parity_cases_hold_every_value():
    cases = bench.parity_cases()
    assert {case.kernel for case in cases} == {1, 3, 5, 7, 9, 13, 17, 21}
    assert {case.gate for case in cases} == set(bench.GATES)
    assert {case.stages for case in cases} == {1, 2, 3}
    assert {case.grid for case in cases} == {(33, 47), (1, 65), (64, 1), (5, 3)}


def test_parity_is_checked(monkeypatch):
    case = bench.Case("small", 1, 3, 4, 8, 3, 2)
    bench.check_parity(case, "float32", "cpu")  # the reference, against itself in float64

    def wrong(*args):
        return reference.pyramid_of_tokens(*args) * 1.01

    monkeypatch.setattr(library, "pyramid", wrong)
    with pytest.raises(ConvFusionError, match=r"the output is off by 1\.0e-02"):
        bench.check_parity(case, "float32", "cpu")
    noise = iter(range(1, 100))
    monkeypatch.setattr(
        library,
        "pyramid",
        lambda *args: reference.pyramid_of_tokens(*args) * (1 + next(noise) * 2e-7),
    )
    with pytest.raises(ConvFusionError, match="two runs differ"):
        bench.check_parity(case, "float32", "cpu")


def test_dry_run_lists_every_case(capsys):
    assert bench.main(["--dry-run", "--dtypes", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bench.CASES) * len(bench.PASSES)
    assert any("depthwise 13" in line and "112 a byte" in line for line in lines)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path / "new" / "times.csv")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no CUDA GPU here" in said
    assert not list(tmp_path.iterdir())


def test_table_is_written_whole(tmp_path):
    row = bench.Row(
        "a", "float16", "forward", "fused", 1.23456789, 1.0, 2.0, 10, 20, 2.0, "memory",
        0.5, 0.25, 3000.0, 50.0, "GPU", "2.13", "3.7", "13",
    )  # fmt: skip
    bench.write([row], tmp_path / "out" / "times.csv")
    head, line = (tmp_path / "out" / "times.csv").read_text().splitlines()
    assert head.split(",")[:5] == ["case", "dtype", "work", "path", "ms"]
    assert line.startswith("a,float16,forward,fused,1.2346,1,2,10,20,2,memory")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["times.csv"]
