"""Halo blocks against their equations, written out query by query, and all that a mixer must do."""

import copy
import itertools
import json
import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CASES, pixart, randomise, run
from torch._subclasses.fake_tensor import FakeTensorMode

import convfusion
from convfusion import ConvFusionError, Halo, uniform
from convfusion.export import export_onnx
from convfusion.families import example_inputs
from convfusion.mixers import halo, halo_grid, mixer_from_dict, mixer_to_dict
from convfusion.mixers.halo_grid import GridLine, count_outside, pool_cells
from convfusion.mixers.halo_whole import mix_whole
from convfusion.operations import count
from convfusion.surgery import mixers_of

CHANNELS, HEADS = 8, 2
GRIDS = [(4, 6), (9, 11), (13, 5), (1, 1), (1, 17), (16, 16)]


def build(channels=CHANNELS, heads=HEADS, std=0.5, **options):
    """A block with values that matter in all of its parameters."""
    mixer = Halo(**options).build(channels, heads)
    randomise({"": mixer}, std)
    return mixer


def tokens_on(grid, batch=2, channels=CHANNELS):
    generator = torch.Generator().manual_seed(1 + math.prod(grid))
    return torch.randn(batch, math.prod(grid), channels, generator=generator)


def find_window(place, side, block, window):
    """The keys of a query along an axis: round its block, and moved inwards at the border."""
    reach = min(window, side)
    first = place // block * block - (window - block) // 2
    first = max(0, min(first, side - reach))
    return range(first, first + reach)


def part_into_cells(side, cells):
    bounds = [cell * side // max(1, cells) for cell in range(cells + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]


def one_by_one(mixer, tokens, grid):
    """The equations, query by query."""
    config, r = mixer.config, mixer.key_rank
    blocks, windows, cells = (config.sides(name) for name in ("block", "window", "cells"))
    query = mixer.to_q(tokens).unflatten(2, (mixer.heads, -1))
    both = mixer.to_kv(tokens).unflatten(2, (mixer.heads, -1))
    key, value = both[..., :r], both[..., r:]
    at = {place: i for i, place in enumerate(itertools.product(*map(range, grid)))}
    parts = [part_into_cells(s, min(c, s)) for s, c in zip(grid, cells, strict=True)]
    far = [[at[p] for p in itertools.product(*each)] for each in itertools.product(*parts)]
    rows = []
    for place, index in at.items():
        ways = zip(place, grid, blocks, windows, strict=True)
        near = [at[p] for p in itertools.product(*(find_window(*each) for each in ways))]
        scores = [torch.einsum("bhr,bnhr->bhn", query[:, index], key[:, near])]
        for i, token in enumerate(near):
            other = list(at)[token]
            offset = (o - p + w - 1 for o, p, w in zip(other, place, windows, strict=True))
            scores[0][:, :, i] += mixer.relative[(slice(None), *offset)]
        values = [value[:, near]]
        for cell in far:
            outside = len(set(cell) - set(near))
            if outside:
                score = torch.einsum("bhr,bhr->bh", query[:, index], key[:, cell].mean(1))
                scores.append((score + math.log(outside) + mixer.far)[:, :, None])
                values.append(value[:, cell].mean(1, keepdim=True))
        weights = torch.cat(scores, dim=2).softmax(2)
        rows.append(torch.einsum("bhn,bnhd->bhd", weights, torch.cat(values, dim=1)).flatten(1))
    return mixer.to_out(torch.stack(rows, dim=1))


def gradients_of(found, mixer, tokens):
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    wanted = [tokens, *mixer.parameters()]
    return torch.autograd.grad((found * weights).sum(), wanted, materialize_grads=True)


@settings(max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    block=st.integers(1, 5),
    more=st.integers(0, 5),
    cells=st.integers(0, 5),
    heads=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3),
    chunk=st.sampled_from([1, 32, 512]),
)
def test_a_block_is_its_equations(grid, block, more, cells, heads, batch, chunk):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(halo, "CHUNK", chunk)
        mixer = build(heads=heads, block=block, window=block + more, cells=cells)
        tokens = tokens_on(grid, batch)
        with torch.no_grad():
            torch.testing.assert_close(
                mixer(tokens, grid), one_by_one(mixer, tokens, grid), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("grid", [(3, 9, 7), (5, 4, 6), (1, 1, 1), (2, 3, 11)])
@pytest.mark.parametrize("chunk", [1, 512])
def test_videos_have_blocks_windows_and_cells_of_their_own_on_each_axis(grid, chunk, monkeypatch):
    monkeypatch.setattr(halo, "CHUNK", chunk)
    mixer = build(block=(1, 2, 3), window=(3, 5, 4), cells=(2, 1, 3))
    assert mixer.ranks == (3,) and mixer.relative.shape == (HEADS, 5, 9, 7)
    tokens = tokens_on(grid)
    with torch.no_grad():
        torch.testing.assert_close(
            mixer(tokens, grid), one_by_one(mixer, tokens, grid), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_those_of_the_equations_however_it_is_worked(grid, monkeypatch):
    """In one piece, in chunks, and in chunks that the backward pass computes again."""
    mixer, tokens = build(block=3, window=5, cells=3), tokens_on(grid).requires_grad_()
    expected = gradients_of(one_by_one(mixer, tokens, grid), mixer, tokens)
    whole = mixer(tokens, grid)
    found = [gradients_of(whole, mixer, tokens)]
    monkeypatch.setattr(halo, "CHUNK", 16)
    found.append(gradients_of(mixer(tokens, grid), mixer, tokens))
    monkeypatch.setattr(halo, "RECOMPUTED", 0)
    assert torch.allclose(mixer(tokens, grid), whole, atol=1e-5)
    found.append(gradients_of(mixer(tokens, grid), mixer, tokens))
    for each in found:
        for mine, theirs in zip(each, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (2, 8), (1, 1)])
@torch.no_grad()
def test_with_full_ranks_and_a_window_over_the_grid_it_is_the_attention(grid, bias):
    attention = Attention(query_dim=32, heads=4, dim_head=8, bias=bias).eval()
    randomise({"": attention}, std=0.3)
    mixer = Halo(key_ratio=1, value_ratio=1).build(32, 4)
    mixer.init_from(attention)
    tokens = tokens_on(grid, channels=32)
    target = attention(tokens)
    assert (mixer(tokens, grid) - target).norm() < 1e-5 * target.norm()


@settings(max_examples=40)
@given(
    grid=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    cells=st.integers(1, 9),
    window=st.integers(1, 12),
)
def test_cells_part_the_grid_and_windows_take_their_tokens_out(grid, cells, window):
    block = min(4, window)
    lines = [GridLine(side, block, window, min(cells, side)) for side in grid]
    device = torch.device("cpu")
    sizes = [line.count_cells(device)[0] for line in lines]
    assert [int(each.sum()) for each in sizes] == list(grid)
    assert min(int(each.min()) for each in sizes) >= 1
    outside = count_outside(lines, device)
    reach = math.prod(min(window, side) for side in grid)
    assert outside.min() >= 0 and (outside.sum(1) == math.prod(grid) - reach).all()
    tokens = tokens_on(grid)
    pooled = pool_cells(tokens, lines)
    weights = torch.kron(*sizes).float()[:, None]
    torch.testing.assert_close(
        (pooled * weights).sum(1), tokens.sum(1), rtol=1e-4, atol=1e-4
    )  # each token in exactly one


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": (2, 4, 4), "window": (4, 8, 8), "cells": (1, 4, 4)},
        {"block": 2, "window": (4, 6), "cells": 0, "key_ratio": 1, "value_ratio": 0.1},
    ],
)
def test_settings_come_back_from_json(options):
    config = Halo(**options)
    assert mixer_from_dict(json.loads(json.dumps(mixer_to_dict(config)))) == config
    assert hash(config) == hash(copy.deepcopy(config))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": 0}, "block must be whole numbers from 1 to 64"),
        ({"window": 65}, "window must be whole numbers from 1 to 64"),
        ({"cells": -1}, "cells must be whole numbers from 0 to 64"),
        ({"block": 4, "window": 3}, "window must be at least block: 3 is below 4"),
        ({"block": (4, 4), "window": (8, 3)}, "window must be at least block: 3 is below 4"),
        ({"block": (4,)}, "block must be one number, or 2 or 3 of them"),
        ({"block": (4, 4), "window": (8, 8, 8)}, "a number for each axis alike"),
        ({"key_ratio": 0}, "key_ratio must lie above 0"),
        ({"value_ratio": 1.5}, "value_ratio must lie above 0 and be at most 1"),
        ({"value_ratio": math.nan}, "value_ratio"),
        ({"block": True}, "block"),
        ({"window": (8, 8.0)}, "window"),
        ({"block": "4"}, "block"),
    ],
)
def test_settings_are_checked(options, said):
    with pytest.raises(ConvFusionError, match=said):
        Halo(**options)


def test_a_block_says_what_does_not_fit():
    with pytest.raises(ConvFusionError, match="3 heads do not divide 16 channels"):
        Halo().build(16, 3)
    with pytest.raises(ConvFusionError, match="N = 12 tokens"):
        Halo().build(16, 2)(torch.zeros(1, 12, 16), (3, 5))
    for attention in (Attention(32, heads=2, dim_head=16), Attention(16, heads=4, dim_head=4)):
        with pytest.raises(ConvFusionError, match="the attention's"):
            Halo().build(16, 2).init_from(attention)
    model = CASES[0].model()
    with pytest.raises(ConvFusionError, match="choose another mixer for this site"):
        convfusion.convert(model, uniform(Halo(block=(1, 4, 4))))


def count_saved(mixer, tokens, grid):
    """Bytes that the backward pass of a call keeps, beside its input and weights."""
    own = {t.untyped_storage().data_ptr() for t in (tokens, *mixer.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mixer(tokens, grid)
    del out
    return sum(size for size, _ in kept.values())


def test_training_keeps_no_windows(monkeypatch):
    """What is kept of a large call is a few times its tokens; its windows would be far more."""
    mixer, grid = build(32, 4), (64, 64)
    tokens = tokens_on(grid, batch=4, channels=32).requires_grad_()
    again = count_saved(mixer, tokens, grid)
    monkeypatch.setattr(halo, "RECOMPUTED", 10**9)
    assert 3 * again < count_saved(mixer, tokens, grid)
    assert again < 4 * tokens.nbytes, again / tokens.nbytes


@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("grid", [(9, 11), (16, 16), (64, 48)])
@torch.no_grad()
def test_half_precision_is_near(dtype, near, grid):
    mixer, tokens = build(32, 4, std=0.2), tokens_on(grid, channels=32)
    expected = mixer(tokens, grid)
    found = mixer.to(dtype)(tokens.to(dtype), grid)
    assert found.dtype == dtype and found.isfinite().all()
    assert (found.float() - expected).norm() < near * expected.norm()


def test_indices_are_made_once_and_serve_every_kind_of_call():
    """What a call under inference mode made must serve a training; a mode's tensors never stay."""
    mixer, tokens = build(32, 4, std=0.2), tokens_on((7, 9), channels=32)
    halo_grid._keep.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        mixer(tokens, (7, 9))
    assert halo_grid._keep.cache_info().currsize == 0
    with torch.inference_mode():
        expected = mixer(tokens, (7, 9))
    made = halo_grid._keep.cache_info().misses
    found = mixer(tokens.requires_grad_(), (7, 9))
    found.sum().backward()
    assert tokens.grad is not None
    assert torch.equal(found, expected)
    assert made == halo_grid._keep.cache_info().misses > 0
    mixer(tokens_on((9, 7), channels=32), (9, 7))
    assert halo_grid._keep.cache_info().misses > made


@pytest.mark.parametrize(
    ("options", "channels", "grid"),
    [
        ({}, 32, (9, 11)),  # ranks 2 and 4
        ({"key_ratio": 1.0, "value_ratio": 1.0}, 32, (16, 8)),  # of 8: nothing to fill
        ({"cells": 0}, 32, (5, 13)),
        ({"block": (2, 2, 2), "window": (2, 4, 4), "cells": (1, 2, 2)}, 32, (3, 6, 5)),
    ],
)
@pytest.mark.parametrize("chunk", [12, 2**16])
def test_fused_attention_does_the_same(monkeypatch, options, channels, grid, chunk):
    mixer, tokens = build(channels, 4, std=0.2, **options), tokens_on(grid, channels=channels)
    monkeypatch.setattr(halo, "CHUNK", chunk)
    tokens.requires_grad_()
    wanted = [tokens, *mixer.parameters()]
    weights = torch.randn(tokens.shape)

    def run():
        out = mixer(tokens, grid)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]

    expected = run()
    monkeypatch.setattr(halo, "FUSED", ("cpu",))
    monkeypatch.setattr(halo, "FUSED_FROM", 0)
    for found, right in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_counts_beyond_float16_stay_finite():
    """A cell of a very large picture holds more tokens than the largest number of float16."""
    mixer = build(2, 1, cells=1).half()
    lines = mixer._lay_out((300, 300))
    call = halo._Call(mixer, lines, 512, False)
    assert call.far.isfinite().all() and call.far.max() > math.log(65504)


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, (16, 24)),
        ({"block": 8, "window": 16, "cells": 8}, (32, 32)),
        ({"key_ratio": 0.5, "cells": 0}, (24, 16)),
    ],
)
def test_operations_are_those_of_the_formula(options, grid):
    mixer = Halo(**options).build(32, 4).to("meta")
    ranks = mixer.heads * (mixer.key_rank + mixer.value_rank)
    cells = mixer.config.cells**2
    each = 2 * 2 * 32 * ranks + 2 * (mixer.config.window**2 + cells) * ranks
    pooled = 2 * cells * 32 * ranks  # keys and values of the cells
    tokens = torch.empty(3, math.prod(grid), 32, device="meta")
    assert count(mixer, tokens, grid) == 3 * (each * math.prod(grid) + pooled)


@pytest.mark.parametrize("dynamic", [None, True])
def test_it_compiles_whole_once_for_each_size(dynamic):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mixer, sizes = build(), [(12, 20), (9, 3)]
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for grid in sizes * 2:
        tokens = tokens_on(grid).requires_grad_()
        found, expected = compiled(tokens, grid), mixer(tokens, grid)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        pairs = zip(*(gradients_of(o, mixer, tokens) for o in (found, expected)), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(sizes)
    torch._dynamo.reset()


@pytest.mark.parametrize("grid", [*GRIDS, (2, 3, 11)])
def test_in_one_piece_it_is_the_same(grid):
    """What is compiled and exported."""
    options = {"block": (1, 2, 3), "window": (3, 5, 4)} if len(grid) == 3 else {}
    mixer, tokens = build(**options), tokens_on(grid)
    with torch.no_grad():
        whole = mixer.to_out(mix_whole(mixer, tokens, mixer._lay_out(grid)))
        torch.testing.assert_close(whole, mixer(tokens, grid), rtol=1e-4, atol=1e-5)


def test_checkpointing_with_two_shapes_in_flight():
    case = CASES[0]
    model = case.model()
    convfusion.convert(model, "halo")
    randomise(mixers_of(model), 0.2)
    expected = [run(model, case, *size) for size in case.sizes]
    wanted = [p for mixer in mixers_of(model).values() for p in mixer.parameters()]
    gradients = torch.autograd.grad(sum(each.square().sum() for each in expected), wanted)
    model.enable_gradient_checkpointing()
    model.train()
    found = [run(model, case, *size) for size in case.sizes]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(sum(each.square().sum() for each in found), wanted)
    for mine, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_every_family_converts_copies_saves_and_reverts(case, tmp_path):
    model = case.model()
    stock = [run(model, case, *size) for size in case.sizes]
    convfusion.convert(model, "halo")
    randomise(mixers_of(model), 0.2)
    expected = [run(model, case, *size) for size in case.sizes]
    assert not torch.allclose(expected[0], stock[0])
    copied = copy.deepcopy(model)
    convfusion.save(model, tmp_path / "blocks")
    convfusion.revert(model)
    assert all(torch.equal(run(model, case, *s), e) for s, e in zip(case.sizes, stock, strict=True))
    convfusion.load(model, tmp_path / "blocks")
    for each in (model, copied):
        found = [run(each, case, *size) for size in case.sizes]
        assert all(map(torch.equal, found, expected))


@pytest.mark.libraries
@torch.no_grad()
def test_one_onnx_file_serves_every_batch_height_and_width(tmp_path):
    """Odd grids, and those smaller than a window or with fewer tokens than cells, among them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = pixart(num_layers=1).eval()
    convfusion.convert(model, "halo")
    randomise(mixers_of(model), 0.3)
    written = export_onnx(model, tmp_path / "model.onnx")
    assert max(written.errors.values()) < 1e-4
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 1, 1), (1, 1, 9), (4, 7, 9), (2, 13, 20), (5, 3, 33)):
        inputs = example_inputs(model, (2 * height, 2 * width), batch=batch, words=5)
        found = session.run(None, {name: inputs[name].numpy() for name in written.inputs})[0]
        torch.testing.assert_close(
            torch.from_numpy(found), model(**inputs)[0], rtol=1e-3, atol=1e-4
        )


def test_on_the_meta_device_it_costs_nothing():
    with torch.device("meta"):
        mixer = Halo().build(320, 8)
        tokens = torch.empty(2, 128 * 128, 320)
    out = mixer(tokens, (128, 128))
    assert out.is_meta and out.shape == tokens.shape
