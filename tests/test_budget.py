"""A budget holds, what is chosen is best within it, and nothing is taken from a damaged file."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up import REACHES, made_up_moments
from tiny_models import CASES, FLAT, sd15

import convfusion
from convfusion.bench.models import bench_model
from convfusion.budget import (
    Budget,
    Moments,
    RatioError,
    choose_mixers,
    list_allocations,
    parse_budget,
)
from convfusion.budget.candidates import (
    Shape,
    add_errors,
    count_operations,
    list_candidates,
    list_uniform,
    set_halo,
)
from convfusion.budget.knapsack import find_front, list_undominated
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.families import list_sites
from convfusion.fingerprint import fingerprint
from convfusion.mixers import Halo
from convfusion.operations import mixer_operations

OPTION = st.tuples(st.integers(0, 40).map(float), st.integers(0, 40).map(float))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)
LATENTS = {"sd15": (64, 64), "sdxl": (128, 128)}


@given(ITEMS, st.integers(0, 200))
def test_the_knapsack_is_as_good_as_trying_everything(items, budget):
    front = find_front(items)
    sums = [tuple(map(sum, zip(*each, strict=True))) for each in itertools.product(*items)]
    errors = [error for cost, error in sums if cost <= budget]
    row = front.within(budget)
    assert (row is None) == (not errors)
    if row is not None:
        assert front.errors[row] == min(errors)
        picked = [item[pick] for item, pick in zip(items, front.picks[row], strict=True)]
        assert sum(cost for cost, _ in picked) == front.costs[row] <= budget
        assert sum(error for _, error in picked) == front.errors[row]


@given(ITEMS)
def test_a_front_that_is_thinned_still_adds_up_and_is_never_worse_than_greedy(items):
    front, exact = find_front(items, most=3), find_front(items)
    assert (np.diff(front.costs) > 0).all() and (np.diff(front.errors) < 0).all()
    for cost, error, picks in zip(front.costs, front.errors, front.picks, strict=True):
        picked = [item[pick] for item, pick in zip(items, picks, strict=True)]
        assert (cost, error) == tuple(map(sum, zip(*picked, strict=True)))
    assert front.costs[0] == exact.costs[0] and front.errors[-1] == exact.errors[-1]


def test_many_items_stay_near_the_bound_of_the_relaxed_problem():
    generator = np.random.default_rng(0)
    items = []
    for _ in range(40):
        falling = np.sort(generator.random(40))[::-1]
        rising = np.sort(generator.random(40)) * generator.choice([1.0, 10.0, 100.0])
        items.append(list(zip(rising.tolist(), falling.tolist(), strict=True)))
    front = find_front(items)
    for budget in np.linspace(front.costs[0] * 1.2, front.costs[-1] * 0.9, 20):
        row = front.within(budget)
        # No choice is below the line of any price, error + price·cost, of the relaxed problem.
        bound = max(
            sum(min(e + price * c for c, e in item) for item in items) - price * budget
            for price in np.geomspace(1e-5, 10, 300)
        )
        assert bound <= front.errors[row] <= 1.02 * bound + 0.02


def test_an_option_that_is_dearer_and_no_better_is_left_out():
    options = [(3.0, 1.0), (1.0, 2.0), (2.0, 2.0), (1.0, 5.0), (4.0, 1.0)]
    assert list_undominated(options) == [1, 0]


@pytest.mark.parametrize("text", ["4x", " 4 X", "4.0×"])
def test_a_budget_of_operations(text):
    assert parse_budget(text) == Budget(4.0, "x")


def test_a_budget_of_seconds():
    assert parse_budget(".8s") == Budget(0.8, "s")


@pytest.mark.parametrize("text", ["", "4", "x", "-4x", "4x4", "1x", "0s", "nanx", "1e999x"])
def test_no_budget(text):
    with pytest.raises(ConvFusionError, match="budget"):
        parse_budget(text)


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 0.99))
def test_errors_add_up_to_less_than_their_sum_and_more_than_each(a, b, c):
    total = add_errors(a, b, c)
    assert max(a, b, c) - 1e-12 <= total <= min(a + b + c, 1) + 1e-12
    assert add_errors(a, 1.5) == 1.5


@pytest.mark.parametrize("grid", [(16, 16), (5, 7), (1, 1), (33, 20)])
def test_operations_of_every_rank_are_those_that_the_counter_finds(grid):
    for channels, heads in ((64, 4), (12, 12)):
        shape = Shape(channels, heads, grid)
        for reach, (key, value) in itertools.product(REACHES[1:4], [(1 / 8, 3 / 8), (0.3, 0.9)]):
            halo = set_halo(reach, key, value)
            with torch.device("meta"):
                mixer = halo.build(channels, heads)
                tokens = torch.empty(1, math.prod(grid), channels)
            assert count_operations(halo, shape) == mixer_operations(mixer, tokens, grid)


def test_uniform_blocks_rise_in_cost():
    shape = Shape(320, 8, (64, 64))
    costs = [count_operations(halo, shape) for halo in list_uniform()]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)


@pytest.mark.parametrize("name", LATENTS)
def test_full_size_layouts_with_moments(name):
    model, latents = bench_model(name).denoiser, LATENTS[name]
    moments = made_up_moments(model, latents)
    allocations = list_allocations(model, moments, latents, Budget(4))
    for ratio in (1.5, 4, 12, 40):
        chosen = allocations.within(Budget(ratio))
        assert chosen.saving >= ratio
        assert len(chosen.sites) == len(list_sites(model))
        assert chosen.epsilon_error == pytest.approx(sum(s.epsilon_error for s in chosen.sites))
    config = choose_mixers(model, "12x", moments=moments).config()
    assert config == allocations.within(Budget(12)).config()
    assert convfusion.convert(model, config).converted == len(config.sites)


@pytest.mark.parametrize("name", LATENTS)
def test_full_size_layouts_without_moments(name):
    model = bench_model(name).denoiser
    chosen = choose_mixers(model, "6x", size=LATENTS[name])
    assert chosen.saving >= 6 and chosen.epsilon_error is None
    assert len({site.mixer for site in chosen.sites}) == 1
    assert "nothing was measured" in str(chosen).lower()
    ladder = list(list_uniform())
    above = ladder[ladder.index(chosen.sites[0].mixer) + 1]
    cost = sum(
        count_operations(above, Shape(s.site.channels, s.site.heads, s.grid)) for s in chosen.sites
    )
    assert chosen.before / cost < 6  # no larger ranks would do
    assert convfusion.convert(model, chosen.config()).converted == len(chosen.sites)


def test_more_budget_never_predicts_worse():
    model = bench_model("sd15").denoiser
    allocations = list_allocations(
        model, made_up_moments(model, (64, 64)), (64, 64), parse_budget("2x")
    )
    chosen = [allocations.within(Budget(ratio)) for ratio in np.geomspace(60, 1.05, 80)]
    errors = [each.epsilon_error for each in chosen]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert all(each.saving >= each.budget.value * (1 - 1e-12) for each in chosen)


@pytest.mark.parametrize("case", FLAT, ids=lambda case: case.name)
def test_every_family_converts_as_chosen(case):
    model = case.make()
    moments = made_up_moments(model, (16, 16), fingerprint(model))
    budget = "1.005x" if case.joint else "1.5x"  # on few tokens, most of a shared one is text
    config = choose_mixers(model, budget, moments=moments).config()
    assert convfusion.convert(model, config).converted


def test_attentions_that_are_dearest_are_kept():
    model = sd15()
    moments = made_up_moments(model, (16, 16), fingerprint(model))
    dear = moments.sites[3]
    sites = [replace(s, sensitivity=1.0) if s is dear else s for s in moments.sites]
    moments = replace(moments, sites=tuple(sites))
    chosen = choose_mixers(model, "1.01x", moments=moments, keep=1)
    kept = {site.site.path for site in chosen.sites if site.mixer is None}
    assert dear.path in kept
    assert dear.path not in choose_mixers(
        model, "1.01x", moments=moments, keep=1
    ).config().mixers_for([s.path for s in moments.sites])


def test_what_is_no_choice_says_so_in_one_line():
    model = sd15()
    moments = made_up_moments(model, (16, 16), fingerprint(model))
    wrong = [
        ({"budget": "1e6x"}, "looks like 4x"),
        ({"budget": "100000x", "moments": moments}, r"here: at most [\d.]+x can be had"),
        ({"budget": "100000x"}, r"everywhere: at most [\d.]+x can be had; with moments"),
        ({"budget": "2x", "keep": 1}, "needs moments"),
        ({"budget": "2s"}, "needs moments"),
        ({"budget": "2x", "moments": moments, "keep": 99}, "at least one must be replaced"),
        ({"budget": "2x", "moments": moments, "keep": -1}, "at least one must be replaced"),
        ({"budget": "2x", "moments": replace(moments, teacher="other")}, "other weights"),
        ({"budget": "2x", "moments": replace(moments, sites=moments.sites[1:])}, "other sites"),
    ]
    for options, message in wrong:
        with pytest.raises(ConvFusionError, match=message) as caught:
            choose_mixers(model, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConvFusionError, match="without a device"):
        choose_mixers(model.to("meta"), "2s", moments=moments)
    convfusion.convert(model)
    with pytest.raises(ConvFusionError, match="converted already"):
        choose_mixers(model, "2x", moments=moments)


@pytest.mark.parametrize("measured", [True, False])
def test_what_a_refused_budget_says_can_be_had_is_the_most_there_is(measured):
    model = sd15()
    moments = made_up_moments(model, (16, 16), fingerprint(model)) if measured else None
    with pytest.raises(ConvFusionError) as refused:
        choose_mixers(model, "100000x", moments=moments)
    most = float(re.search(r"at most ([\d.]+)x", str(refused.value))[1])
    assert choose_mixers(model, Budget(most * 0.999), moments=moments).saving >= most * 0.999
    with pytest.raises(ConvFusionError, match="cannot be reached"):
        choose_mixers(model, Budget(most * 1.001), moments=moments)


def test_all_attentions_within_a_budget_are_nothing_to_convert():
    model = sd15()
    moments = made_up_moments(model, (16, 16), fingerprint(model))
    chosen = choose_mixers(model, "1.5x", moments=moments)
    kept = replace(chosen, sites=tuple(replace(site, mixer=None) for site in chosen.sites))
    with pytest.raises(ConvFusionError, match="nothing to convert"):
        kept.config()


def test_candidates_on_a_grid_within_a_window_have_one_reach():
    model = sd15()
    site = replace(made_up_moments(model, (16, 16)).sites[0], grid=(5, 5))
    reaches = {
        (c.mixer.window, c.mixer.cells)
        for c in list_candidates(site, site.grid)
        if isinstance(c.mixer, Halo)
    }
    assert reaches == {(6, 1)}


def test_seconds_are_measured_and_hold():
    model = next(case for case in CASES if case.name == "pixart").make()  # sites of one shape
    moments = made_up_moments(model, (16, 16), fingerprint(model))
    allocations = list_allocations(model, moments, (16, 16), parse_budget("1s"), batch=1)
    least = float(allocations.front.costs[0])
    chosen = allocations.within(Budget(2 * least, "s"))
    assert chosen.seconds <= 2 * least
    assert chosen.seconds == pytest.approx(sum(site.seconds for site in chosen.sites))
    assert "Measured on this device" in str(chosen)
    with pytest.raises(ConvFusionError, match=r"here: at least [\d.]+s is needed"):
        allocations.within(Budget(least / 2, "s"))


def test_moments_come_back_as_they_were(tmp_path):
    moments = made_up_moments(sd15(), (16, 24))
    moments.save(tmp_path / "moments.json")
    assert Moments.load(tmp_path / "moments.json") == moments


def set_in(content, *place, value):
    *outer, last = place
    for step in outer:
        content = content[step]
    if value is None:
        del content[last]
    else:
        content[last] = value


DAMAGES = [
    (("schema",), "convfusion-curve-1"),
    (("schema",), None),
    (("teacher",), None),
    (("teacher",), 3),
    (("more",), 1),
    (("latents",), [16]),
    (("latents",), [16, "a"]),
    (("sites",), []),
    (("sites",), {}),
    (("sites", 0), 7),
    (("sites", 0, "path"), 7),
    (("sites", 0, "channels"), -8),
    (("sites", 0, "heads"), True),
    (("sites", 0, "grid"), [0, 4]),
    (("sites", 0, "scores"), []),
    (("sites", 0, "scores"), [[0.5]]),
    (("sites", 0, "scores", 0), [2.0, 0.1]),
    (("sites", 0, "scores", 0), [0.25, 0.1]),  # twice
    (("sites", 0, "values", 0), [0.125, -1.0]),
    (("sites", 0, "values", 0), [0.125, math.nan]),
    (("sites", 0, "values", 0), [0.125, "0.1"]),
    (("sites", 0, "far", 0), [[4, 6], 0.1]),
    (("sites", 0, "far", 0), [[4, 2, 1], 0.1]),  # a window smaller than its block
    (("sites", 0, "sensitivity"), math.inf),
    (("sites", 0, "sensitivity"), None),
    (("sites", 1, "path"), "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
]


@pytest.mark.parametrize(("place", "value"), DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(place, value, tmp_path):
    file = tmp_path / "moments.json"
    made_up_moments(sd15(), (16, 16)).save(file)
    content = json.loads(file.read_text())
    set_in(content, *place, value=value)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"moments\.json") as caught:
        Moments.load(file)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_json_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(CheckpointError, match=name):
            Moments.load(tmp_path / name)


def test_moments_made_by_hand_are_checked_too():
    moments = made_up_moments(sd15(), (16, 16))
    with pytest.raises(ConvFusionError, match="ratio"):
        replace(moments.sites[0], scores=(RatioError(0.0, 0.1),))
    with pytest.raises(ConvFusionError, match="each of them once"):
        replace(moments, sites=())
