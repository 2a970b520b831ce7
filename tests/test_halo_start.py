"""Halo blocks that start from the attention they replace, and the tokens it is measured on."""

import itertools
import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_models import CASES, PLAIN, run

import convfusion
from convfusion import ConvFusionError, DeltaConv, Halo, mini, uniform
from convfusion.distill.startup import draw_noised_batches
from convfusion.families import list_sites
from convfusion.families.watch import sample_attention
from convfusion.mixers.halo_start import set_from_sample
from convfusion.mixers.offsets import sum_by_offset
from convfusion.mixers.tokens import TokenSample
from convfusion.surgery import mixers_of
from convfusion.surgery.start import measure_imitation

pytestmark = pytest.mark.libraries


def attention_of_rank(rank, channels=16, heads=2, bias=True):
    """An attention whose heads compare and hand on no more than so many directions."""
    torch.manual_seed(0)
    attention = Attention(channels, heads=heads, dim_head=channels // heads, bias=bias).eval()
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            weight = torch.randn(heads, channels // heads, rank) @ torch.randn(
                heads, rank, channels
            )
            layer.weight.copy_(weight.flatten(0, 1) / math.sqrt(channels))
            if bias:
                layer.bias.normal_(std=0.3)
    return attention.requires_grad_(False)


def sample_of(*grids, channels=16):
    return [TokenSample(torch.randn(1, math.prod(grid), channels), grid) for grid in grids]


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_scores_and_values_of_low_rank_are_kept_whole(bias):
    """Within a window over the grid nothing is lost, on grids of several sizes."""
    attention = attention_of_rank(2, bias=bias)
    mixer = Halo(key_ratio=3 / 8 if bias else 2 / 8, value_ratio=2 / 8).build(16, 2)
    sample = sample_of((8, 8), (5, 7), (6, 6))
    set_from_sample(mixer, attention, sample)
    tokens = torch.randn(3, 48, 16)
    target = attention(tokens)
    assert (mixer(tokens, (6, 8)) - target).norm() < 2e-3 * target.norm()
    assert measure_imitation(mixer, attention, sample) < 1e-5


@torch.no_grad()
def test_offsets_are_counted_as_loops_count_them():
    grid, reach = (4, 5), (2, 3)
    query, key = torch.randn(2, 3, 2, 20, 4)
    sums, counts = sum_by_offset(query, key, grid, reach)
    expected, seen = torch.zeros(2, 5, 7), torch.zeros(5, 7)
    places = list(itertools.product(*map(range, grid)))
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        down, across = b[0] - a[0] + 2, b[1] - a[1] + 3
        if 0 <= down < 5 and 0 <= across < 7:
            expected[:, down, across] += (query[:, :, i] * key[:, :, j]).sum((0, 2))
            seen[down, across] += 3
    torch.testing.assert_close(sums[:, :-1], expected.flatten(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(counts[:-1], seen.flatten()) and counts.sum() == 3 * 20 * 20


@torch.no_grad()
def test_the_bias_is_the_mean_of_what_the_rank_leaves_out():
    attention, grid = attention_of_rank(8), (4, 4)
    mixer = Halo(key_ratio=1 / 8).build(16, 2)
    sample = sample_of(grid, grid)
    set_from_sample(mixer, attention, sample)
    tokens = torch.cat([each.tokens for each in sample])

    def heads(mapped):
        return mapped.unflatten(-1, (2, -1)).transpose(1, 2)

    key = heads(attention.to_k(tokens))
    key = key - key.mean(2, keepdim=True)
    low = heads(mixer.to_kv(tokens))[..., : mixer.key_rank]
    low = low - low.mean(2, keepdim=True)
    full = heads(attention.to_q(tokens)) @ key.transpose(2, 3) * attention.scale
    left = full - heads(mixer.to_q(tokens)) @ low.transpose(2, 3)
    diagonal = left.diagonal(dim1=2, dim2=3).mean((0, 2))
    torch.testing.assert_close(mixer.relative[:, 7, 7], diagonal, rtol=1e-3, atol=1e-4)
    assert mixer.relative[:, 0].abs().max() == 0  # no pair is so far apart on 4×4


def calls_of(case, *sizes):
    return [case.inputs(*size) for size in sizes]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_bare_denoiser_of_every_family_starts_closer(case):
    model = case.model()
    expected = run(model, case, *case.sizes[0])
    convfusion.convert(model, "halo")
    before = (run(model, case, *case.sizes[0]) - expected).norm()
    errors = convfusion.start_from_attention(model, calls_of(case, *case.sizes))
    assert list(errors) == [site.path for site in list_sites(model)]
    assert all(0 <= error < 1.5 for error in errors.values())
    assert (run(model, case, *case.sizes[0]) - expected).norm() < before
    assert convfusion.status(model).record.origin == "attention"


def test_only_some_sites_start_and_others_are_left():
    case = CASES[3]
    model = case.model()
    first, second, third = (site.path for site in list_sites(model))
    config = {first: Halo(), second: DeltaConv(3), third: convfusion.Removed()}
    convfusion.convert(model, convfusion.ConvertConfig(config))
    assert set(convfusion.start_from_attention(model, calls_of(case, (16, 16)))) == {first, second}
    assert set(convfusion.start_from_attention(model, [], only=[third])) == set()
    with pytest.raises(ConvFusionError, match="no call of the model was given"):
        convfusion.start_from_attention(model, [])


def test_on_the_embedded_model_it_is_nearer_than_from_weights_alone():
    pipe = mini.load_teacher()
    convfusion.convert(pipe, "halo")
    calls = list(draw_noised_batches(pipe, mini.training_data(), pictures=8, batch_size=2))
    from convfusion.demo import measure_error, spread

    held_out = spread(mini.held_out_data("choice"), 2)
    before = measure_error(pipe, held_out)
    errors = convfusion.start_from_attention(pipe, calls)
    assert max(errors.values()) < 0.5
    assert measure_error(pipe, held_out) < 0.75 * before


def test_a_model_in_half_precision_starts_too():
    case = CASES[3]
    model = case.model()
    convfusion.convert(model, "halo")
    single = convfusion.start_from_attention(model, calls_of(case, (16, 16)))
    model = case.model().to(torch.bfloat16)
    convfusion.convert(model, "halo")
    call = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in case.inputs(16, 16).items()
    }
    half = convfusion.start_from_attention(model, [call])
    for path, mixer in mixers_of(model).items():
        assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in mixer.parameters())
        assert half[path] == pytest.approx(single[path], abs=0.05)


@pytest.mark.parametrize("mixer", [Halo(), DeltaConv(3)])
@pytest.mark.parametrize("name", ["to_q", "to_v"])
def test_weights_that_are_not_finite_are_one_clear_line(mixer, name):
    case = CASES[3]
    model = case.model()
    convfusion.convert(model, uniform(mixer))
    site = list_sites(model)[0].path
    torch.nn.init.constant_(getattr(model.get_submodule(site), name).weight, math.nan)
    with pytest.raises(ConvFusionError, match="not finite") as raised:
        convfusion.start_from_attention(model, calls_of(case, (16, 16)))
    assert site in str(raised.value) and "\n" not in str(raised.value)


@torch.no_grad()
def pictures_kept(memory, seed, sizes=((16, 16),) * 4):
    """What is kept of four calls of two pictures each, at one site; and how many bytes."""
    case = CASES[3]
    model = case.model()
    site = list_sites(model)[0].path
    with sample_attention(model, [site], memory, seed) as samples:
        for size in sizes:
            model(**case.inputs(*size))
    assert set(samples) == {site}
    return samples[site], sum(each.tokens.nbytes for each in samples[site])


def test_what_is_kept_of_the_tokens_is_bounded_and_its_choice_seeded():
    everything, size = pictures_kept(1.0, 0)
    assert len(everything) == 8 and all(each.grid == (8, 8) for each in everything)
    some, small = pictures_kept(size / 2 / 2**30, 0)
    again, _ = pictures_kept(size / 2 / 2**30, 0)
    assert len(some) == 4 and small <= size / 2
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(some, again, strict=True))
    assert len(pictures_kept(0.0, 0)[0]) == 2
    growing = ((16, 16), (16, 16), (32, 32), (32, 32))
    mixed, bytes_kept = pictures_kept(size / 2 / 2**30, 1, growing)
    assert bytes_kept <= max(size / 2, 2 * mixed[-1][0].nbytes)


def test_every_picture_has_the_same_chance_to_be_kept():
    """Of 8 pictures 4 are kept; over 60 seeds each about 30 times."""
    sizes = ((16, 16), (16, 18), (16, 20), (16, 22))  # tell the calls apart
    everything, _ = pictures_kept(1.0, 0, sizes)
    largest = max(each.tokens.nbytes for each in everything)
    counts = dict.fromkeys(range(8), 0)
    for seed in range(60):
        for kept in pictures_kept(4 * largest / 2**30, seed, sizes)[0]:
            found = [
                number
                for number, each in enumerate(everything)
                if each.grid == kept.grid and torch.equal(each.tokens, kept.tokens)
            ]
            counts[found[0]] += 1
    assert sum(counts.values()) == 240
    assert min(counts.values()) >= 17 and max(counts.values()) <= 43  # 3.4 standard deviations
