"""What is counted, timed and planned of attentions that text and image share."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from tiny_models import JOINT

import convfusion
from convfusion import ConvFusionError, DeltaConv, MeanOnly, Removed
from convfusion.bench import speed_plan
from convfusion.bench.counts import (
    add_totals,
    list_contenders,
    operation_table,
    whole_costs,
)
from convfusion.bench.joint_counts import count_joint, write_joint
from convfusion.bench.latency import Measured, Variant, make_call, time_site
from convfusion.bench.models import BenchModel, bench_model, full_size_configs
from convfusion.bench.timing import Timing
from convfusion.families import example_inputs, list_sites
from convfusion.families.joint import JOINT_HALO
from convfusion.mixers import Halo, Shared
from convfusion.operations import JointCounter, count, site_operations
from convfusion.shapes import find_joint_calls, stock_on_meta
from convfusion.surgery.config import ConvertConfig
from convfusion.surgery.presets import get_preset

SIZE = (12, 20)
MIXERS = [JOINT_HALO, Halo(4, 4, 2, 1.0, 1.0), DeltaConv(5), MeanOnly(), Removed()]
MIXERS += [Shared(DeltaConv(3), "cells"), Shared(DeltaConv(3), "constant")]


def joint_sites(model):
    return [site for site in list_sites(model) if site.joint]


cases = pytest.mark.parametrize("case", JOINT, ids=lambda case: case.name)
FULL = [
    name
    for name, full in full_size_configs().items()
    if full[0] in {type(case.model()).__name__ for case in JOINT}
]


def on_meta(case):
    with torch.device("meta"):
        return BenchModel(case.name, case.make().eval(), 8)


@cases
def test_parts_are_what_the_attention_and_the_converted_one_count(case):
    model = on_meta(case).denoiser
    sites = joint_sites(model)[:: len(joint_sites(model)) - 1]  # SD3's last one gives no text
    counter = JointCounter(model, SIZE)
    calls = find_joint_calls(model, SIZE, sites)
    for site in sites:
        call, parts = calls[site.path], counter.count(site)
        stock = model.get_submodule(site.path)
        assert parts.whole == count(stock, *call.args, **call.kwargs)
        n, c = math.prod(call.grid), site.channels
        words = counter.read_tokens(site).text.key.shape[2]
        rows = counter.read_tokens(site).text.query.shape[2]
        assert parts.image == 4 * n * n * c
        assert parts.text == 4 * c * (n * words + rows * (n + words))
        kept = getattr(stock, "to_k", None)  # Lumina 2 has fewer channels of keys and values
        shared = c if kept is None else kept.out_features
        assert parts.projections >= 2 * n * c * (2 * c + 2 * shared)
        for mixer in MIXERS if site is sites[0] else [JOINT_HALO]:
            found = counter.count(site, mixer)
            assert found.kept == parts.kept
            module = counter.build(site, mixer)
            assert found.whole == count(module, *call.args, **call.with_grid())
        assert counter.count(site, Removed()).image == 0


@cases
def test_the_window_counts_by_hand(case):
    model = on_meta(case).denoiser
    site = joint_sites(model)[0]
    counter = JointCounter(model, (16, 16))
    n, window, cells = math.prod(counter.find_call(site).grid), 4, 2
    halo = Halo(4, window, cells, 1.0, 1.0)
    assert counter.count(site, halo).image == 4 * n * (window**2 + cells**2) * site.channels


@cases
def test_operations_of_a_converted_model_leave_out_nothing_that_stays(case):
    model = case.model()
    counter = JointCounter(model, SIZE)
    convfusion.convert(model)
    found = site_operations(model, SIZE)
    for site in joint_sites(model):
        mixer = model.get_submodule(site.path).mixer.config
        parts = counter.count(site), counter.count(site, mixer)
        assert found[site.path] == tuple(each.whole for each in parts)
    assert set(found) == {site.path for site in list_sites(model)}


@cases
def test_the_denoiser_after_is_what_the_converted_one_counts(case):
    model = on_meta(case)
    pixels = (SIZE[0] * 8, SIZE[1] * 8)
    configs = list_contenders(model)
    assert {name.split()[0] for name in configs} == {"attention", "delta_conv", "halo"}
    configs = {name: config for name, config in configs.items() if "delta" not in name}
    rows = count_joint(model, [pixels], configs)
    costs = operation_table(model, [pixels], configs)
    whole = {cost.mixer: cost.operations for cost in whole_costs(model, add_totals(costs))}
    for row in rows:
        assert (row.denoiser_before, row.denoiser_after) == (
            whole["attention"],
            whole[row.mixer],
        )
        assert row.words > row.tokens and row.image_before > 0 < row.text
        converted = on_meta(case).denoiser
        convfusion.convert(converted, configs[row.mixer])
        assert count(converted, **example_inputs(converted, SIZE)) == row.denoiser_after


def test_the_file_has_what_goes_and_what_stays(tmp_path):
    rows = count_joint(on_meta(JOINT[0]), [(64, 64)])
    write_joint(rows, tmp_path / "joint.csv")
    with open(tmp_path / "joint.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for name in ("image_before", "image_after", "text", "denoiser_before", "denoiser_after"):
        assert [int(row[name]) for row in read] == [getattr(row, name) for row in rows]


def test_a_published_model_costs_what_its_shapes_say():
    """By 12·C² of each token and block, without modulation and embedders, and by attention."""
    model = bench_model("sd3-medium")
    (row,) = count_joint(model, [(1024, 1024)], {"halo": ConvertConfig({"*": JOINT_HALO})})
    n, t, c, blocks = 4096, 333, 24 * 64, 24
    assert (row.tokens, row.words) == (n, t)
    assert row.image_before == 4 * n * n * c * blocks
    assert row.image_before / row.image_after == n / (16**2 + 8**2)
    assert row.text == 4 * c * blocks * (n * t + t * (n + t))
    by_hand = 2 * 12 * c * c * (n + t) * blocks + row.image_before + row.text
    assert row.denoiser_before == pytest.approx(by_hand, rel=0.03)
    assert row.denoiser_before / row.denoiser_after == pytest.approx(1.344, abs=0.001)


@pytest.mark.parametrize("name", FULL)
def test_published_models_convert_on_meta(name):
    model = bench_model(name)
    sites = joint_sites(model.denoiser)
    status = convfusion.convert(model.denoiser)
    assert status.converted == len(list_sites(model.denoiser)) >= len(sites) > 0
    assert all(row.attention_parameters == 0 for row in status.sites if row.site.joint)
    shapes = stock_on_meta(model.denoiser)
    assert len(find_joint_calls(shapes, (32, 32), sites[:1])) == 1


@pytest.mark.parametrize("backward", [False, True])
@cases
def test_shared_attentions_are_timed_with_parity_in_double_precision(case, backward):
    model = on_meta(case).denoiser
    config = convfusion.uniform(Halo(4, 4, 2, 1.0, 1.0))
    variants = {"attention": Variant(), "block": Variant(config)}
    variants["shared"] = Variant(convfusion.uniform(DeltaConv(3)))
    for site in joint_sites(model)[:: len(joint_sites(model)) - 1]:
        found = time_site(model, site, variants, (5, 6), batch=1, rounds=1, backward=backward)
        assert all(each.timing and 0 < each.parity < 1e-5 for each in found.values()), found


@cases
def test_a_call_is_that_of_the_denoiser_with_values(case):
    model = case.model()
    site = joint_sites(model)[-1]
    call = make_call(model, site, (3, 5), 2, torch.bfloat16, torch.device("cpu"))
    tokens = site.joint.project(
        model.get_submodule(site.path).bfloat16(), (3, 5), *call.args, **call.kwargs
    )
    assert tokens.image.query.shape[:3] == (2, site.heads, 15)
    assert all(each.dtype == torch.bfloat16 for each in (*tokens.image, *tokens.text))
    assert all(each.isfinite().all() and each.std() > 0.1 for each in tokens.image)


def test_what_stays_of_a_shared_attention_is_part_of_the_rest(monkeypatch):
    """Seconds of the attention are those above what stays; of noise, a share of a hundredth."""
    case = next(case for case in JOINT if case.name == "prx")
    times = {"attention": 5.0, "block": 3.0, "what stays of it": 2.0}

    def timed(model, site, variants, grid, **options):
        return {name: Measured(Timing((times[name],), None)) for name in variants}

    monkeypatch.setattr(speed_plan, "time_site", timed)
    model, config = case.model(), get_preset(case.preset)
    (plan,) = speed_plan.plan_speed(model, config, (16, 16), batch=1).sites
    assert plan.joint and plan.attention_weights == 0
    assert plan.seconds == pytest.approx((2 * 3.0, 2 * 1.0))
    times["what stays of it"] = 4.0
    (plan,) = speed_plan.plan_speed(model, config, (16, 16), batch=1).sites
    assert plan.seconds == pytest.approx((2 * 1.0, 2 * 0.03))
    told = " ".join(speed_plan.describe_plan(speed_plan.plan_speed(model, config, (16, 16)), 8, 16))
    assert "only what goes from image to image" in told and "no weights to drop" in told


def test_sizes_that_a_model_has_no_places_for_are_refused():
    model = bench_model("sd35-large")
    assert model.draws((3072, 3072)) and not model.draws((3072, 3088))
    with pytest.raises(ConvFusionError, match="at most 3072 pixels along a side, not 4096×1024"):
        model.latents((1024, 4096))
    with pytest.raises(ConvFusionError, match="latents of at most 384 along a side, not 512×64"):
        JointCounter(model.denoiser, (64, 512))


def test_what_knows_nothing_of_a_text_is_refused_by_name():
    model = bench_model("sd3-medium")
    with pytest.raises(ConvFusionError, match="ToMe knows nothing of a text: choose Halo"):
        list_contenders(model, ["tome"])
    assert list(list_contenders(model, ["halo", "mean_only"])) == [
        "attention",
        "halo 1 1",
        "mean_only",
    ]
    mixed = list_contenders(bench_model("sd35-medium"), ["halo"])
    config = mixed["halo 0.25 0.5"]
    assert config.mixer_for("transformer_blocks.3.attn") == JOINT_HALO
    assert config.mixer_for("transformer_blocks.3.attn2").key_ratio == 0.25
