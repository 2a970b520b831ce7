"""What is predicted from moments is near what is then measured, on the embedded model."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import PLAIN

import convfusion
from convfusion import mini
from convfusion.budget import Budget, choose_mixers, list_allocations, measure_moments
from convfusion.budget.candidates import covers, list_candidates, set_halo
from convfusion.budget.measure import CELLS, RATIOS, WINDOWS, list_reaches
from convfusion.distill.budget_curve import budget_curve
from convfusion.distill.startup import draw_noised_batches
from convfusion.errors import ConvFusionError
from convfusion.families import example_inputs, list_sites
from convfusion.fingerprint import fingerprint
from convfusion.mixers import Halo, MeanOnly
from convfusion.surgery import convert, revert, start_from_attention


@pytest.fixture(scope="module")
def pipe():
    return mini.load_teacher()


@pytest.fixture(scope="module")
def calls(pipe):
    return list(draw_noised_batches(pipe, mini.training_data(), pictures=8, batch_size=4))


@pytest.fixture(scope="module")
def moments(pipe, calls):
    return measure_moments(pipe, calls)


def output(pipe, calls):
    with torch.no_grad():
        return torch.cat([pipe.unet(**call)[0] for call in calls])


def test_measuring_leaves_the_model_as_it_was(pipe, moments):
    assert not convfusion.status(pipe).converted
    assert moments.teacher == fingerprint(pipe.unet)
    assert [site.path for site in moments.sites] == [s.path for s in list_sites(pipe.unet)]
    assert moments.latents == (16, 16)


def test_all_channels_and_the_whole_grid_lose_nothing(moments):
    for site in moments.sites:
        assert dict(site.scores)[1.0] == dict(site.values)[1.0] == 0
        for reach, error in site.far:
            assert error < 1e-6 if covers(reach, site.grid) else error > 0
        for spectrum in (site.scores, site.values):
            errors = [error for _, error in spectrum]
            assert [ratio for ratio, _ in spectrum] == list(RATIOS)
            assert all(b <= a + 0.01 for a, b in itertools.pairwise(errors))
        assert site.delta_conv > 0.1 and site.mean_only > 0.1


def test_the_imitation_error_is_that_which_was_predicted(pipe, calls, moments):
    halo = Halo(4, 8, 4, 0.25, 0.5)
    convert(pipe, convfusion.uniform(halo))
    measured = start_from_attention(pipe, calls)
    revert(pipe)
    for site in moments.sites:
        reach = next(r for r, _ in site.far if r[1:] == (8, 4) or covers(r, site.grid))
        (predicted,) = (
            c.error
            for c in list_candidates(site, site.grid)
            if c.mixer == set_halo(reach, 0.25, 0.5)
        )
        assert measured[site.path] == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0])
def test_the_output_error_is_within_a_factor_of_two_of_the_prediction(pipe, calls, moments, ratio):
    taught = output(pipe, calls)
    chosen = choose_mixers(pipe, f"{ratio}x", moments=moments)
    convert(pipe, chosen.config())
    measured = start_from_attention(pipe, calls)
    learned = output(pipe, calls)
    revert(pipe)
    errors = (learned - taught).square().sum((1, 2, 3)) / taught.square().sum((1, 2, 3))
    assert chosen.epsilon_error / 2 < errors.mean().item() < 2 * chosen.epsilon_error
    assert chosen.expect(measured, moments) < 1.3 * chosen.epsilon_error


def test_chosen_ranks_are_better_than_equal_ones(pipe, calls, moments):
    equal = choose_mixers(pipe, "3x")
    chosen = list_allocations(pipe, moments, (16, 16), Budget(3)).within(Budget(equal.saving))
    taught, errors = output(pipe, calls), []
    for each in (equal, chosen):
        convert(pipe, each.config())
        start_from_attention(pipe, calls)
        errors.append((output(pipe, calls) - taught).square().mean().item())
        revert(pipe)
    assert chosen.saving >= equal.saving and errors[1] < 0.7 * errors[0]


def test_the_curve_falls_with_the_budget(pipe, calls, moments, tmp_path):
    data = mini.held_out_data("choice")
    data = type(data)(data.latents[:2], data.captions[:2])
    points = budget_curve(pipe, data, moments, lambda: calls, budgets=(2, 6, 1e5))
    by_moments = [p for p in points.points if p.choice == "moments"]
    assert [p.budget for p in points.points] == [2, 6, 2, 6]  # 1e5 cannot be reached
    assert by_moments[0].measured < by_moments[1].measured
    assert by_moments[0].predicted < by_moments[1].predicted
    csv, png = points.save(tmp_path / "curve")
    assert len(csv.read_text().splitlines()) == 5 and png.stat().st_size > 1000
    assert not convfusion.status(pipe).converted


SMALL = [c for c in PLAIN if c.sites < 10 and c.name not in ("video", "svd")]  # as `motion`


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_family_is_measured(case):
    model = case.make().eval()
    found = measure_moments(model, [example_inputs(model, case.latents(16, 16), batch=2)])
    assert len(found.sites) == len(list_sites(model))
    assert all(site.sensitivity >= 0 for site in found.sites)
    assert choose_mixers(model, "1.5x", moments=found).epsilon_error >= 0


def test_the_reaches_of_a_grid_end_with_one_that_sees_all_of_it():
    assert list_reaches((8, 8))[-1].window == 8
    assert sum(covers(reach, (8, 8)) for reach in list_reaches((8, 8))) == 1
    assert len(list_reaches((64, 64))) == len(WINDOWS) * len(CELLS)
    assert len(list_reaches((1, 1))) == 1


def test_what_cannot_be_measured_says_so(pipe, calls):
    with pytest.raises(ConvFusionError, match="no call"):
        measure_moments(pipe, [])
    convert(pipe, convfusion.uniform(MeanOnly()))
    with pytest.raises(ConvFusionError, match="is converted"):
        measure_moments(pipe, calls)
    revert(pipe)
