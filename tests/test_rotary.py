"""Queries and keys as attentions with norms and rotary embeddings compare them."""

import itertools
import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_models import CASES, ltx2

import convfusion
from convfusion import ConvFusionError, Halo, MeanOnly, uniform
from convfusion.errors import UnsupportedModelError
from convfusion.families import Family, example_inputs, family_of, list_sites
from convfusion.families.rotary import PairTurn
from convfusion.families.watch import can_watch, sample_attention, watch_attention
from convfusion.mixers.base import as_plain, normed_heads
from convfusion.mixers.nearest_layers import average_turn, fit_norms
from convfusion.mixers.sampling import attend_at
from convfusion.mixers.tokens import TokenSample
from convfusion.surgery import attention_teacher, mixers_of
from convfusion.surgery.start import measure_imitation

BY_NAME = {case.name: case for case in CASES}
SIZES = ((3, 8, 12), (4, 12, 6))
FRAMES = Halo(block=(2, 2, 2), window=(2, 4, 4), cells=(1, 2, 2), key_ratio=0.5)


def wan_calls():
    model = BY_NAME["wan"].model()
    for block in model.blocks:  # norms as a training leaves them
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.uniform_(norm.weight, 0.5, 3)
    return model, [example_inputs(model, size, batch=2, words=5) for size in SIZES]


def table_calls(name):
    case = BY_NAME[name]
    return case.model(), [case.inputs(*size) for size in case.sizes]


def interleaved_calls():
    """An LTX-2 whose channels are turned over all heads, as the guidance of LTX-2.3 calls it."""
    model = ltx2(rope_type="interleaved", perturbed_attn=True)
    sizes = ((3, 4, 6), (2, 3, 4))
    return model.eval(), [example_inputs(model, size, batch=2, words=5) for size in sizes]


MODELS = {
    "wan": wan_calls,
    "hunyuan": lambda: table_calls("hunyuan"),  # norms of each head, turned
    "sd35": lambda: table_calls("sd35"),  # norms of each head
    "wan-image": lambda: table_calls("wan-image"),
    "skyreels": lambda: table_calls("skyreels"),
    "vace": lambda: table_calls("vace"),
    "latte": lambda: table_calls("latte"),
    "cosmos": lambda: table_calls("cosmos"),
    "kandinsky": lambda: table_calls("kandinsky"),  # names of its own
    "ltx": lambda: table_calls("ltx"),  # other angles in each head
    "ltx2": lambda: table_calls("ltx2"),  # gates
    "ltx2-interleaved": interleaved_calls,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_is_worked_out_again_is_what_the_attention_gives(kind, dtype):
    """At every site and two sizes: scores, values and their sum, from tokens and rotary alone."""
    model, calls = MODELS[kind]()
    cast_model(model, dtype)
    given, outputs = {}, {}

    def see(site, attention, sample):
        if site.joint is None:
            given[site.path] = (attention, sample)

    def keep(path):
        return lambda module, args, output: outputs.__setitem__(path, output)

    handles = [
        model.get_submodule(site.path).register_forward_hook(keep(site.path))
        for site in list_sites(model)
    ]
    for call in calls:
        call = {k: cast(v, dtype) for k, v in call.items()}
        with watch_attention(model, see):
            model(**call)
        for path, (attention, sample) in given.items():
            assert (sample.turn is not None) == family_of(model).rotary
            chosen = torch.arange(0, sample.tokens.shape[1], 3)
            found = attend_at(attention, sample, chosen)
            error = (found - outputs[path][:, chosen].float()).abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 0.03) * found.abs().max()
    for handle in handles:
        handle.remove()


def cast_model(model, dtype):
    """As `from_pretrained` does it, which keeps some modules in float32."""
    model.to(dtype)
    for name, module in model.named_modules():
        if any(part in name for part in model._keep_in_fp32_modules or ()):
            module.float()


def cast(value, dtype):
    if isinstance(value, tuple):
        return tuple(cast(each, dtype) for each in value)
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


@torch.no_grad()
def test_where_tokens_lie_matters():
    model, calls = wan_calls()
    sites = {site.path for site in list_sites(model)}
    with sample_attention(model, sites, memory=1.0) as samples:
        for call in calls:
            model(**call)
    sample = samples["blocks.0.attn1"]
    assert len({id(each.turn) for each in sample}) == len(SIZES)  # one for each grid
    assert samples["blocks.1.attn1"][0].turn is sample[0].turn
    attention, chosen = model.blocks[0].attn1, torch.arange(10)
    turned, plain = (
        attend_at(attention, sample[0]._replace(turn=turn), chosen)
        for turn in (sample[0].turn, None)
    )
    assert (turned - plain).norm() > 0.01 * plain.norm()


def test_how_every_family_compares_tokens_is_known():
    assert all(can_watch(case.make()) for case in CASES)


def test_a_rotary_embedding_of_an_unknown_kind_is_refused(monkeypatch):
    model, calls = wan_calls()
    monkeypatch.setattr(type(family_of(model)), "find_turn", Family.find_turn)
    with (
        pytest.raises(UnsupportedModelError, match="turns its queries and keys"),
        watch_attention(model, lambda *_: None),
    ):
        model(**calls[0])


def test_a_call_without_the_rotary_embedding_is_one_clear_line():
    with pytest.raises(ConvFusionError, match="without the rotary embedding"):
        PairTurn.of((torch.zeros(1, 4, 8), None))


@pytest.mark.parametrize("grid", [(5, 6), (2, 4, 3)])
def test_the_turn_to_the_keys_around_is_that_of_loops(grid):
    size, window = 6, (2, 4, 4)[: len(grid)]
    angles = torch.randn(math.prod(grid), size // 2).repeat_interleave(2, dim=1)
    turn = PairTurn(angles.cos(), angles.sin())
    places = list(itertools.product(*map(range, grid)))
    rotations = turn(torch.eye(size).expand(len(places), -1, -1).transpose(0, 1)[None])[0]
    rotations = rotations.permute(1, 2, 0)  # [N, d, d]
    expected = torch.zeros(size, size)
    for query, a in enumerate(places):
        near = [
            key
            for key, b in enumerate(places)
            if all(abs(i - j) <= w // 2 for i, j, w in zip(a, b, window, strict=True))
        ]
        expected += rotations[query].T @ rotations[near].mean(0)
    found = average_turn(turn, grid, window, 2, size, torch.device("cpu"))
    torch.testing.assert_close(found, expected.expand(2, -1, -1) / len(places))


@torch.no_grad()
def test_the_layer_nearest_to_a_norm_is_the_best_one():
    """Of a root mean square: no other linear layer of the tokens is nearer on the sample."""
    attention = Attention(16, heads=2, dim_head=8, qk_norm="rms_norm", bias=True)
    torch.nn.init.uniform_(attention.norm_q.weight, 0.5, 2)
    sample = [TokenSample(torch.randn(2, 40, 16) + 0.3, (5, 8)) for _ in range(3)]
    query, _, value = fit_norms(attention, sample)
    assert torch.equal(value.weight, attention.to_v.weight)
    tokens = torch.cat([each.tokens for each in sample])
    wanted = normed_heads(attention, tokens)[0]
    given = attention.to_q(tokens).unflatten(-1, (2, 8)).transpose(1, 2)
    found = query.split(tokens, 2)
    for head in range(2):
        known = torch.cat([given[:, head], torch.ones(6, 40, 1)], dim=-1).flatten(0, 1)
        best = known @ torch.linalg.lstsq(known, wanted[:, head].flatten(0, 1)).solution
        torch.testing.assert_close(found[:, head].flatten(0, 1), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "mixer"),
    [
        ("wan", FRAMES),
        ("hunyuan", Halo(key_ratio=0.5)),
        ("wan", MeanOnly()),
        ("cosmos", FRAMES),
        ("kandinsky", FRAMES),
        ("ltx", FRAMES),
        ("ltx2", FRAMES),
        ("ltx2-interleaved", FRAMES),
        ("ltx2", MeanOnly()),
        ("kandinsky", MeanOnly()),
    ],
)
@torch.no_grad()
def test_blocks_start_nearer_than_from_weights_alone(kind, mixer):
    model, calls = MODELS[kind]()
    for site in list_sites(model):  # sharper maps than random weights have
        as_plain(model.get_submodule(site.path)).norm_q.weight.mul_(3)
    sites = [site.path for site in list_sites(model)]
    convfusion.convert(model, uniform(mixer))
    teacher = attention_teacher(model)
    with sample_attention(teacher, sites, memory=1.0) as samples:
        for call in calls:
            teacher(**call)
    before = {
        path: measure_imitation(block, teacher.get_submodule(path), samples[path])
        for path, block in mixers_of(model).items()
    }
    after = convfusion.start_from_attention(model, calls)
    assert after.keys() == before.keys()
    share = 0.9 if isinstance(mixer, Halo) else 1  # random attention has little of a mean
    assert all(after[path] < share * before[path] for path in sites), (before, after)


def place_calls():
    """A Wan whose attention depends on the offset of a key alone, and is most at the query."""
    model = BY_NAME["wan"].model()
    for block in model.blocks:
        layers = [(block.attn1.to_q, block.attn1.norm_q), (block.attn1.to_k, block.attn1.norm_k)]
        bias = torch.randn(len(block.attn1.to_q.bias))
        for layer, norm in layers:
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data.copy_(bias)
            torch.nn.init.constant_(norm.weight, 1.5)
    return model, [example_inputs(model, (4, 12, 14), batch=2, words=5)]


@torch.no_grad()
def test_what_depends_on_the_offset_alone_a_halo_block_has_from_the_start():
    model, calls = place_calls()
    everything = Halo(block=(2, 2, 2), window=(4, 7, 7), cells=(1, 1, 1), value_ratio=1.0)
    convfusion.convert(model, uniform(everything))
    errors = convfusion.start_from_attention(model, calls)
    assert max(errors.values()) < 1e-5


@torch.no_grad()
def test_what_lies_outside_of_windows_is_weighed_against_what_lies_inside():
    """Of an attention that falls off, the pooled tokens get less than their number."""
    model, calls = place_calls()
    near = Halo(block=(2, 2, 2), window=(2, 4, 4), cells=(2, 2, 2), value_ratio=1.0)
    convfusion.convert(model, uniform(near))
    errors = convfusion.start_from_attention(model, calls)
    teacher = attention_teacher(model)
    with sample_attention(teacher, errors, memory=1.0) as samples:
        teacher(**calls[0])
    for path, mixer in mixers_of(model).items():
        assert mixer.far.shape == (2,) and mixer.far.abs().min() > 0
        mixer.far.zero_()
        attention = teacher.get_submodule(path)
        assert errors[path] < 0.8 * measure_imitation(mixer, attention, samples[path])
