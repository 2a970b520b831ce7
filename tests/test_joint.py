"""Attention that text and image share: in parts it is the same, and its mixers keep the text."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import JOINT, first_output, randomise, run
from torch import nn

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, MeanOnly, Removed, uniform
from convfusion.families import example_inputs, list_sites
from convfusion.families.watch import attention_at, sample_attention, watch_tokens
from convfusion.mixers import Halo, Neighbourhood, Shared, joint, mixer_from_dict, mixer_to_dict
from convfusion.mixers.joint import (
    JointMixer,
    attend_from_image,
    attend_from_text,
    attend_to_text,
    blend,
    estimate_total,
)
from convfusion.mixers.tokens import Heads, JointTokens
from convfusion.surgery import attention_back, install, mixers_of, revert
from convfusion.surgery.start import measure_imitation, start_from_attention

table = pytest.mark.parametrize("case", JOINT, ids=lambda case: case.name)
SIZES = ((24, 40), (40, 24))
WHOLE = Halo(block=4, window=20, cells=2, key_ratio=1.0, value_ratio=1.0)  # of 12×20 tokens
NEAR = Halo(block=4, window=8, cells=2, key_ratio=1.0, value_ratio=1.0)


class ExactMixer(JointMixer):
    """Image to image without any approximation, blended by the exact sums."""

    def forward(self, tokens, grid):
        query, key, value = tokens.image
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        total = scores.logsumexp(-1, keepdim=True).float()
        rows = scores.softmax(-1) @ value
        if tokens.text.key.shape[2]:
            rows = blend(rows, total, query, tokens)
        return rows.transpose(1, 2).flatten(2)


def joint_sites(model):
    return [site for site in list_sites(model) if site.joint is not None]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["exact", "halo"])
@table
@torch.no_grad()
def test_with_all_of_the_attention_it_is_the_stock_model(case, kind):
    for size in SIZES:
        model = case.model()
        expected = run(model, case, *size)
        sites = joint_sites(model)
        if kind == "exact":
            install(model, {site.path: ExactMixer() for site in sites}, keep_attention=True)
        else:
            convfusion.convert(model, ConvertConfig({site.path: WHOLE for site in sites}))
        assert relative(run(model, case, *size), expected) < 1e-5
        revert(model)
        assert torch.equal(run(model, case, *size), expected)


@table
@torch.no_grad()
def test_rows_of_the_text_are_exact_whatever_the_image_does(case):
    """What each attention returns besides the image's rows, for the same input."""
    model, texts = case.model(), {}
    sites = joint_sites(model)

    def keep(module, args, kwargs, output, path, kind):
        texts.setdefault(path, {})[kind] = output

    for kind in ("stock", "removed"):
        twin = case.model()
        if kind == "removed":
            convfusion.convert(twin, ConvertConfig({sites[0].path: Removed()}))
        handle = twin.get_submodule(sites[0].path).register_forward_hook(
            lambda m, a, k, o, kind=kind: keep(m, a, k, o, sites[0].path, kind), with_kwargs=True
        )
        run(twin, case, *SIZES[0])
        handle.remove()
    stock, removed = (texts[sites[0].path][kind] for kind in ("stock", "removed"))
    if not isinstance(stock, tuple):  # one sequence, or no rows of text at all
        pytest.skip("this attention returns one sequence, which its own tests take apart")
    assert relative(removed[0], stock[0]) > 1e-2
    assert relative(removed[1], stock[1]) < 1e-6


@table
@torch.no_grad()
def test_what_is_worked_out_again_is_what_the_attention_gives(case):
    """Of the samples that analysis, starts and budgets are made of."""
    model, seen, outputs = case.model(), {}, {}

    def see(site, attention, sample):
        if site.joint is not None:
            rows = attend_from_image(sample.joint), attend_from_text(sample.joint)
            seen[site.path] = site.joint, rows, calls[site.path]

    calls, handles = {}, []
    for site in joint_sites(model):
        module = model.get_submodule(site.path)

        def note(module, args, kwargs, path=site.path):
            calls[path] = (args, kwargs)

        def keep(module, args, output, path=site.path):
            outputs[path] = output

        handles += [
            module.register_forward_pre_hook(note, with_kwargs=True, prepend=True),
            module.register_forward_hook(keep),
        ]
    with watch_tokens(model, see):
        run(model, case, *SIZES[0])
    for path, (layout, rows, (args, kwargs)) in seen.items():
        found = layout.finish(model.get_submodule(path), *rows, *args, **kwargs)
        given = outputs[path]
        pairs = ((found, given),)
        if isinstance(found, tuple):
            pairs = zip(found, given, strict=True)
        assert all(relative(a, b) < 1e-5 for a, b in pairs), path
    assert set(seen) == {site.path for site in joint_sites(model)}


@table
@torch.no_grad()
def test_bfloat16_is_as_far_from_float32_as_stock(case):
    inputs = case.inputs(*SIZES[0])
    exact = run(case.model(), case, *SIZES[0])

    def run_short(model):
        def cast(value):
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.bfloat16() if floating else value

        leaves = {key: torch.utils._pytree.tree_map(cast, value) for key, value in inputs.items()}
        return model.bfloat16()(**leaves)[0]

    def first(output):
        return output if isinstance(output, torch.Tensor) else torch.stack(list(output))

    stock = relative(first(run_short(case.model())).float(), exact)
    model = case.model()
    sites = joint_sites(model)
    convfusion.convert(model, ConvertConfig({site.path: WHOLE for site in sites}))
    assert relative(first(run_short(model)).float(), exact) < 1.5 * stock


@table
@torch.no_grad()
def test_dropping_the_attention_leaves_one_that_text_and_image_share(case):
    model = case.model()
    convfusion.convert(model)
    expected = run(model, case, *SIZES[0])
    convfusion.drop_attention(model)
    assert torch.equal(run(model, case, *SIZES[0]), expected)
    assert all(
        row.attention_kept and row.attention_parameters == 0
        for row in convfusion.status(model).sites
        if row.site.joint is not None
    )


@table
@torch.no_grad()
def test_the_attention_comes_back_for_a_while(case):
    model = case.model()
    expected = run(model, case, *SIZES[0])
    convfusion.convert(model, uniform(Removed()))
    assert relative(run(model, case, *SIZES[0]), expected) > 1e-3
    with attention_back(model, mixers_of(model)):
        assert torch.equal(run(model, case, *SIZES[0]), expected)


def make_tokens(grid, words=5, heads=2, size=4, batch=2, seen=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(count):
        shape = (3, batch, heads, count, size)
        return Heads(*torch.randn(shape, generator=generator).mul(1.5))

    bias = None
    if seen is not None:
        bias = torch.zeros(batch, words).masked_fill(~seen, torch.finfo(torch.float32).min)
        bias = bias[:, None, None]
    return JointTokens(rows(math.prod(grid)), rows(words), bias)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    words=st.integers(0, 6),
    block=st.integers(1, 4),
    more=st.integers(0, 4),
    cells=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_a_halo_is_one_softmax_over_window_cells_and_text(grid, words, block, more, cells, seed):
    """Against a loop over the queries, with ρ and λ that are not zero."""
    tokens = make_tokens(grid, words, seed=seed)
    mixer = Halo(block, block + more, cells, 1.0, 1.0).build_joint(8, 2)
    nn.init.normal_(mixer.relative)
    nn.init.normal_(mixer.far)
    found = mixer(tokens, grid).unflatten(2, (2, -1)).transpose(1, 2)
    window = block + more
    sees_all = all(side <= window for side in grid)
    (height, width), far = grid, mixer.far
    bounds = [[c * side // n for c in range(n + 1)] for side in grid if (n := min(cells, side))]
    for place in range(height * width):
        at = divmod(place, width)
        starts = [
            max(0, min(a // block * block - more // 2, side - min(window, side)))
            for a, side in zip(at, grid, strict=True)
        ]
        spans = [range(s, s + min(window, side)) for s, side in zip(starts, grid, strict=True)]
        query = tokens.image.query[:, :, place : place + 1] * 4**-0.5
        keys = [y * width + x for y in spans[0] for x in spans[1]]
        shifts = [mixer.relative[:, k // width - at[0] + window - 1, k % width - at[1] + window - 1]
                  for k in keys]  # fmt: skip
        scores = [
            query @ tokens.image.key[:, :, keys].transpose(2, 3) + torch.stack(shifts, 1)[:, None]
        ]
        values = [tokens.image.value[:, :, keys]]
        if cells and not sees_all:
            for top, bottom in zip(bounds[0], bounds[0][1:], strict=False):
                for left, right in zip(bounds[1], bounds[1][1:], strict=False):
                    inside = [y * width + x for y in range(top, bottom) for x in range(left, right)]
                    outside = len(set(inside) - set(keys))
                    if outside:
                        mean = tokens.image.key[:, :, inside].mean(2, keepdim=True)
                        score = query @ mean.transpose(2, 3) + math.log(outside)
                        scores.append(score + far[:, None, None])
                        values.append(tokens.image.value[:, :, inside].mean(2, keepdim=True))
        scores.append(query @ tokens.text.key.transpose(2, 3))
        values.append(tokens.text.value)
        row = torch.cat(scores, 3).softmax(-1) @ torch.cat(values, 2)
        torch.testing.assert_close(found[:, :, place], row[:, :, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_words_that_are_not_seen_are_as_if_they_were_not_there():
    seen = torch.tensor([[True, True, False, True, False], [False] * 5])
    tokens, grid = make_tokens((3, 4), seen=seen), (3, 4)
    for settings_of in (NEAR, Shared(DeltaConv(3)), Shared(MeanOnly(), "constant"), Removed()):
        mixer = settings_of.build_joint(8, 2)
        found = mixer(tokens, grid)
        for sample in range(2):
            kept = torch.arange(5)[seen[sample]]
            image = Heads(*(each[sample : sample + 1] for each in tokens.image))
            text = Heads(*(each[sample : sample + 1, :, kept] for each in tokens.text))
            if not len(kept) and isinstance(settings_of, Removed):
                continue  # of no text at all there is nothing to gather
            alone = mixer(JointTokens(image, text), grid)
            torch.testing.assert_close(found[sample], alone[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_removed_attends_to_the_text_alone():
    tokens = make_tokens((3, 4))
    expected = F.scaled_dot_product_attention(tokens.image.query, *tokens.text[1:])
    found = Removed().build_joint(8, 2)(tokens, (3, 4)).unflatten(2, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_many_rows_are_worked_in_parts(monkeypatch):
    tokens, grid = make_tokens((6, 9)), (6, 9)
    for mixer in (NEAR.build_joint(8, 2), Shared().build_joint(8, 2), Removed().build_joint(8, 2)):
        whole = mixer(tokens, grid)
        with monkeypatch.context() as patch:
            patch.setattr(joint, "ROWS", 100)  # five rows at a time
            torch.testing.assert_close(mixer(tokens, grid), whole)


@torch.no_grad()
def test_a_constant_share_is_that_of_the_tokens():
    tokens = make_tokens((3, 4), seen=torch.tensor([[True] * 5, [True, True, False, False, False]]))
    mixer = Shared(MeanOnly(), "constant").build_joint(8, 2)
    gathered = attend_to_text(tokens.image.query, tokens)[0]
    mixer.inner.proj.weight.zero_()
    mixer.inner.proj.bias.zero_()
    found = mixer(tokens, (3, 4)).unflatten(2, (2, -1)).transpose(1, 2)
    share = torch.tensor([5 / 17, 2 / 14])[:, None, None, None]
    torch.testing.assert_close(found, share * gathered)
    assert not list(mixer.parameters(recurse=False))


@settings(max_examples=20, deadline=None)
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99))
@torch.no_grad()
def test_sums_over_pooled_keys_are_never_above_the_exact_one(grid, seed):
    query, key, _ = make_tokens(grid, seed=seed).image
    exact = (query @ key.transpose(2, 3) / 2).logsumexp(-1, keepdim=True)
    ones, fours, all_of_them = (estimate_total(query, key, grid, cells) for cells in (1, 4, 9))
    assert (ones <= exact + 1e-5).all()
    assert (fours <= exact + 1e-5).all()
    torch.testing.assert_close(all_of_them, exact)
    at_first = math.log(math.prod(grid)) + query @ key.mean(2, keepdim=True).transpose(2, 3) / 2
    torch.testing.assert_close(ones, at_first)


@pytest.mark.parametrize("share", ["predicted", "cells"])
@table
def test_a_measured_share_is_nearer(case, share):
    model = case.model()
    sites = joint_sites(model)
    config = ConvertConfig({site.path: Shared(MeanOnly(), share) for site in sites})
    convfusion.convert(model, config)
    inputs = [case.inputs(*size) for size in SIZES]
    teacher = convfusion.surgery.attention_teacher(model)
    with sample_attention(teacher, [s.path for s in sites], 1.0) as samples, torch.no_grad():
        for call in inputs:
            teacher(**call)
    before = {
        site.path: measure_imitation(
            model.get_submodule(site.path).mixer, attention_at(teacher, site), samples[site.path]
        )
        for site in sites
    }
    after = start_from_attention(model, inputs)
    assert set(after) == set(before)
    assert all(after[path] < before[path] for path in before)


def test_training_computes_large_pictures_again(monkeypatch):
    tokens, grid = make_tokens((16, 20)), (16, 20)
    mixer = NEAR.build_joint(8, 2)

    def gradients():
        leaf = tokens.image.query.detach().requires_grad_()
        image = tokens.image._replace(query=leaf)
        mixed = mixer(tokens._replace(image=image), grid)
        return torch.autograd.grad(mixed.square().sum(), [leaf, *mixer.parameters()])

    plain = gradients()
    monkeypatch.setattr("convfusion.mixers.halo.RECOMPUTED", 1)
    monkeypatch.setattr("convfusion.mixers.halo.CHUNK", 100)
    for again, first in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(again, first)
        assert first.abs().max() > 0


@torch.no_grad()
def test_compiled_it_is_the_same_at_every_size():
    mixer = Halo(2, 4, 2, 1.0, 1.0).build_joint(8, 2)
    nn.init.normal_(mixer.relative)
    nn.init.normal_(mixer.far)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    for grid, words in (((5, 8), 5), ((8, 5), 7)):
        tokens = make_tokens(grid, words)
        found, expected = compiled(tokens, grid), mixer(tokens, grid)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_settings_of_a_shared_mixer_are_read_again():
    mixer = Shared(DeltaConv(5), "cells")
    assert mixer_from_dict(mixer_to_dict(mixer)) == mixer
    assert mixer_to_dict(mixer)["mixer"]["kind"] == "delta_conv"
    assert Shared(DeltaConv(5)).build(8, 2).config == DeltaConv(5)  # with nothing to share
    for wrong, message in (
        (lambda: Shared(DeltaConv(5), "half"), "share must be predicted or cells or constant"),
        (lambda: Shared(Neighbourhood(3)), "Neighbourhood does not mix the values"),
        (lambda: Shared(Shared(DeltaConv(5))), "Shared does not mix the values"),
        (lambda: Shared(NEAR), "Halo does not mix the values"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            wrong()


@table
def test_what_does_not_fit_is_refused_by_name(case):
    model = case.model()
    path = joint_sites(model)[0].path
    for mixer, message in (
        (Halo(), "projections stay, so that fewer channels would save nothing"),
        (Neighbourhood(3), "Neighbourhood knows nothing of a text: choose Halo, DeltaConv"),
    ):
        with pytest.raises(ConvFusionError, match=f"{path}: .*{message}"):
            convfusion.convert(model, ConvertConfig({path: mixer}))
    attention = model.get_submodule(path)

    class OtherProcessor:
        def __call__(self, *args, **kwargs):
            raise AssertionError("never called")

    stock = attention.processor
    attention.processor = OtherProcessor()
    with pytest.raises(ConvFusionError, match=f"{path} has the processor OtherProcessor"):
        convfusion.convert(model)
    attention.processor = stock
    attention.fused_projections = True
    with pytest.raises(ConvFusionError, match=r"are fused: call unfuse_qkv_projections"):
        convfusion.convert(model)
    attention.fused_projections = False
    convfusion.convert(model)
    attention.fused_projections = True  # since then
    with pytest.raises(ConvFusionError, match="are fused"):
        run(model, case, *SIZES[0])


@table
@torch.no_grad()
def test_called_directly_a_model_says_what_is_missing(case):
    """Unless what is called inside of it tells the grid; never is it that of an earlier call."""
    model = case.model()
    convfusion.convert(model, uniform(NEAR))
    expected = [run(model, case, *size) for size in SIZES]
    for size, output in zip(SIZES, expected, strict=True):
        try:
            found = first_output(model.forward(**case.inputs(*size)))
        except ConvFusionError as error:
            assert "no grid reached" in str(error) and "call the denoiser itself" in str(error)
        else:
            assert torch.equal(found, output)


class OtherLinear(nn.Linear):
    """A layer of another kind than PyTorch's, as quantised ones are."""


@table
@torch.no_grad()
def test_projections_may_be_of_another_kind(case):
    model = case.model()
    expected = run(model, case, *SIZES[0])
    for site in joint_sites(model):
        for layer in model.get_submodule(site.path).children():
            if type(layer) is nn.Linear:
                layer.__class__ = OtherLinear
    convfusion.convert(model, ConvertConfig({s.path: WHOLE for s in joint_sites(model)}))
    assert relative(run(model, case, *SIZES[0]), expected) < 1e-5


@table
@torch.no_grad()
def test_other_sizes_than_the_last_are_its_own(case):
    """Of two calls in a row with as many tokens, the second has its own grid."""
    model = case.model()
    convfusion.convert(model, uniform(NEAR))
    randomise(mixers_of(model))
    alone = {size: run(model, case, *size) for size in SIZES}
    both = example_inputs(model, SIZES[0], batch=1, words=5)
    model(**both)
    for size in SIZES:
        assert torch.equal(run(model, case, *size), alone[size])
