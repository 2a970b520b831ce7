"""A plan's arithmetic, on times that are given, and that it can be made for every family."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CASES, run

import convfusion
from convfusion.bench import speed_plan as plan_module
from convfusion.bench.latency import Measured, site_kinds
from convfusion.bench.models import denoiser_on_meta, full_size_configs
from convfusion.bench.speed_plan import (
    Law,
    SitePlan,
    SpeedPlan,
    describe_plan,
    find_cheaper_attention,
    fit_law,
    fit_line,
    plan_speed,
    shrink_grid,
)
from convfusion.bench.timing import Timing
from convfusion.errors import ConvFusionError
from convfusion.families import list_sites
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.surgery import presets
from convfusion.surgery.config import ConvertConfig, uniform

SIZES = st.tuples(st.integers(1, 5000), st.integers(2, 10)).map(lambda n: (n[0], n[0] * n[1]))


@given(SIZES, st.floats(0, 1e-3), st.floats(1e-9, 1e-3))
def test_a_law_is_found_again(sizes, line, square):
    law = fit_law({n: Law(line, square)(n) for n in sizes})
    assert law.linear == pytest.approx(line, rel=1e-6, abs=1e-9 * sizes[1] * square + 1e-12)
    assert law.square == pytest.approx(square, rel=1e-6)


@given(SIZES, st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_a_law_has_no_negative_part_and_passes_the_larger_size(sizes, fast, slow):
    small, large = sizes
    law = fit_law({small: fast, large: slow})
    assert law.linear >= 0 and law.square >= 0
    assert law(large) == pytest.approx(slow)


def test_one_size_gives_a_line():
    assert fit_law({4: 2.0}) == fit_line({4: 2.0}) == Law(0.5)


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.integers(1, 4096))
def test_a_shrunk_grid_fits(grid, tokens):
    height, width = shrink_grid(grid, tokens)
    assert 1 <= height <= grid[0] and 1 <= width <= grid[1]
    assert height * width <= max(tokens, 300)
    if grid[0] * grid[1] <= tokens:
        assert (height, width) == grid


@pytest.mark.parametrize(("name", "whole"), [("wan-1.3b", (21, 60, 104)), ("svd", (25, 72, 128))])
def test_frames_count_among_what_is_timed(name, whole):
    """In a forward pass too; frames that are mixed each by itself stay as many as they are."""
    model = denoiser_on_meta(*full_size_configs()[name])
    fitting = plan_module._fitting(model, whole, 2, 1.0)
    assert 64 <= math.prod(fitting) <= plan_module.LARGEST
    assert fitting[0] == 25 if name == "svd" else fitting[0] < 21
    smaller = plan_module._fitting(model, whole, 2, 0.25)
    assert 1 <= math.prod(smaller) <= math.prod(fitting)
    assert shrink_grid((21, 30, 52), 4096) == (10, 15, 26)


def plan(*, rest=1.0, attention=Law(1e-4, 1e-7), block=Law(2e-4), tokens=4096):
    near = SitePlan(("a", "b"), 320, 7, tokens, attention, block, True, 10, 4)
    far = SitePlan(("c",), 640, 9, tokens // 4, attention, block, True, 40, 16)
    return SpeedPlan((512, 512), 2, (near, far), rest)


def test_the_sums():
    own = plan()
    n, m = 4096, 1024
    attention = 2 * (1e-4 * n + 1e-7 * n * n) + 1e-4 * m + 1e-7 * m * m
    assert own.attention == pytest.approx(1 + attention)
    assert own.converted == pytest.approx(1 + 2 * 2e-4 * n + 2e-4 * m)
    assert own.bound == pytest.approx(1 + attention)
    assert own.weights == (2 * 10 + 40, 2 * 4 + 16)


def test_the_crossover_is_where_both_take_as_long():
    height, width = plan().faster_from
    there = plan(tokens=round(4096 * (height / 512) ** 2))
    assert height == width
    assert there.attention == pytest.approx(there.converted, rel=1e-2)


def test_the_size_that_is_told_can_be_drawn():
    told = " ".join(describe_plan(plan(), 3, 16))
    sides = re.search(r"faster from (\d+)×(\d+) pixels", told).groups()
    assert all(int(side) % 16 == 0 for side in sides)
    assert min(map(int, sides)) >= 3 * plan().faster_from[0]


def test_faster_everywhere_and_nowhere():
    assert plan(block=Law(5e-5)).faster_from == (0, 0)
    assert plan(attention=Law(1e-4)).faster_from is None


def test_a_hybrid_takes_the_cheaper_one():
    own = plan(attention=Law(1e-4, 4e-8))  # 1024 tokens: 1.4e-4 a token against 2e-4
    assert own.kept == ("c",)
    assert own.hybrid < min(own.attention, own.converted)


@pytest.mark.parametrize(("name", "tokens"), [("wan", 3 * 8 * 8), ("svd", 16 * 16)])
def test_a_plan_is_for_as_many_frames_as_are_told(name, tokens):
    """A site that mixes each frame by itself has no more tokens for more of them."""
    case = next(case for case in CASES if case.name == name)
    own = plan_speed(case.model(), presets.get_preset(case.preset), (3, 16, 16), batch=1)
    assert own.size == (3, 16, 16) and own.sites[0].tokens == tokens


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_of_every_family(case):
    model = case.model()
    config = presets.get_preset(case.preset)
    before = run(model, case, 16, 16)
    own = plan_speed(model, config, (16, 16), batch=1)
    assert sum(len(site.paths) for site in own.sites) == case.sites
    assert len(own.sites) == len(site_kinds(model, config))
    assert own.bound > 1 and own.hybrid <= min(own.attention, own.converted)
    assert torch.equal(run(model, case, 16, 16), before)
    with torch.device("meta"):
        full = convfusion.convert(case.make(), config)
    weights = sum(row.attention_parameters for row in full.sites)
    assert own.weights == (4 * weights, 4 * sum(row.mixer_parameters for row in full.sites))
    convfusion.convert(model, config)
    with pytest.raises(ConvFusionError, match="converted already"):
        plan_speed(model, config, (16, 16))


def test_the_attention_is_kept_where_it_is_cheaper(monkeypatch):
    case = CASES[0]
    model = case.model()
    paths = [site.path for site in list_sites(model)]
    slow, fast = uniform(DeltaConv(kernel_size=9)), uniform(DeltaConv(kernel_size=3))
    convfusion.convert(model, ConvertConfig({paths[0]: slow.sites["*"], "*": fast.sites["*"]}))

    def timed(model, site, variants, grid, **options):
        kernel = variants["block"].config.mixer_for(site.path).kernel_size
        times = {"attention": 5.0, "block": float(kernel)}
        return {name: Measured(Timing((time,), None)) for name, time in times.items()}

    monkeypatch.setattr(plan_module, "time_site", timed)
    assert find_cheaper_attention(model, (16, 16)) == (paths[0],)
    with pytest.raises(ConvFusionError, match="not converted"):
        find_cheaper_attention(case.model(), (16, 16))
