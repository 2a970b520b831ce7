"""Budgets of models whose text and image share attentions: what is measured, what is chosen."""

from __future__ import annotations

import pytest
import torch
from made_up import made_up_moments
from tiny_models import JOINT

import convfusion
from convfusion import ConvFusionError, DeltaConv, MeanOnly
from convfusion.budget import Moments, choose_mixers, measure_moments, seconds
from convfusion.budget.candidates import covers, list_candidates
from convfusion.budget.measure import RATIOS, gather_pictures
from convfusion.families import list_sites
from convfusion.families.watch import sample_attention
from convfusion.fingerprint import fingerprint
from convfusion.mixers import Halo
from convfusion.operations import site_operations
from convfusion.surgery import start_from_attention

SIDE = 24


@pytest.fixture(scope="module", params=JOINT, ids=lambda case: case.name)
def measured(request):
    """A model, the call that it was measured with, and its moments."""
    model = request.param.model().requires_grad_(False)
    call = request.param.inputs(SIDE, SIDE)
    return model, call, measure_moments(model, [call])


def test_shared_attentions_are_measured_at_full_rank(measured, tmp_path):
    model, _, moments = measured
    assert moments.latents == (SIDE, SIDE) and not convfusion.status(model).converted
    for site, found in zip(list_sites(model), moments.sites, strict=True):
        assert found.sensitivity > 0 < found.mean_only and found.delta_conv > 0
        reach, error = found.far[-1]
        assert covers(reach, found.grid) and found.far[0].error > 1e-3
        if site.joint:
            assert found.scores == found.values == ((1.0, 0.0),) and error < 1e-9
            halos = [c.mixer for c in list_candidates(found, found.grid) if type(c.mixer) is Halo]
            assert len(halos) == len(found.far)
            assert {(h.key_ratio, h.value_ratio) for h in halos} == {(1.0, 1.0)}
        else:
            assert [ratio for ratio, _ in found.scores] == list(RATIOS)
    moments.save(tmp_path / "moments.json")
    assert Moments.load(tmp_path / "moments.json") == moments


@pytest.mark.parametrize("mixer", [DeltaConv(7), MeanOnly()], ids=["delta_conv", "mean_only"])
def test_errors_are_those_of_blocks_that_start_from_the_attention(measured, mixer):
    model, call, moments = measured
    convfusion.convert(model, convfusion.uniform(mixer))
    started = start_from_attention(model, [call])
    convfusion.revert(model)
    name = "mean_only" if isinstance(mixer, MeanOnly) else "delta_conv"
    for site in moments.sites:
        assert started[site.path] == pytest.approx(getattr(site, name), rel=1e-3)


def test_what_is_chosen_costs_what_the_converted_model_costs(measured):
    model, _, moments = measured
    chosen = choose_mixers(model, "1.02x", moments=moments)
    assert chosen.saving >= 1.02 and "count before and after" in str(chosen)
    convfusion.convert(model, chosen.config())
    counted = site_operations(model, (SIDE, SIDE))
    convfusion.revert(model)
    for each in chosen.sites:
        if each.mixer is not None:
            own = (each.attention_operations, each.operations)
            assert counted[each.site.path] == own
    most = choose_mixers(model, "1.02x", moments=moments, keep=1)
    assert sum(each.mixer is None for each in most.sites) >= 1


def test_without_moments_shared_attentions_see_equally_far(measured):
    model, _, _ = measured
    chosen = choose_mixers(model, "1.001x", size=(40, 40))
    shared = {each.mixer for each in chosen.sites if each.site.joint}
    alone = {each.mixer for each in chosen.sites if not each.site.joint}
    assert len(shared) == 1 >= len(alone)
    assert {(halo.key_ratio, halo.value_ratio) for halo in shared} == {(1.0, 1.0)}
    assert convfusion.convert(model, chosen.config()).converted == len(list_sites(model))
    convfusion.revert(model)


def test_what_cannot_be_reached_says_what_stays(measured):
    model, _, moments = measured
    for options in ({}, {"moments": moments}):
        with pytest.raises(ConvFusionError, match="only what goes from image to image") as caught:
            choose_mixers(model, "30x", **options)
        assert "\n" not in str(caught.value)


def test_seconds_are_those_of_whole_attentions(monkeypatch):
    case = next(case for case in JOINT if case.name == "prx")
    model = case.model().requires_grad_(False)
    moments = made_up_moments(model, (SIDE, SIDE), fingerprint(model))
    monkeypatch.setattr(seconds, "choose_timed", lambda places: [Halo(4, 6, 1, 1.0, 1.0)])
    chosen = choose_mixers(model, "60s", moments=moments, batch=1)
    assert 0 < chosen.seconds <= 60 and chosen.seconds <= chosen.attention_seconds * 1.001


@torch.no_grad()
def test_pictures_with_texts_of_one_length_are_one_batch():
    case = next(case for case in JOINT if case.name == "sd35")
    model = case.model()
    paths = [site.path for site in list_sites(model)]
    calls = [case.inputs(16, 16), case.inputs(16, 16), case.inputs(16, 16)]
    calls[1]["encoder_hidden_states"] = calls[1]["encoder_hidden_states"][:, :3]
    with sample_attention(model, paths, 1.0) as samples:
        for call in calls:
            model(**call)
    for path in paths:
        batches = gather_pictures(samples[path])
        alone = samples[path][0].joint is None
        assert [len(batch.tokens) for batch in batches] == ([6] if alone else [2, 2, 2])
        (both,) = gather_pictures([samples[path][0], samples[path][5]])
        assert torch.equal(both.tokens[1:], samples[path][5].tokens)
        if not alone:
            assert torch.equal(both.joint.text.key[1:], samples[path][5].joint.text.key)
            assert torch.equal(both.joint.image.query[1:], samples[path][5].joint.image.query)


def test_where_every_window_holds_the_grid_another_block_tells_how_much_a_site_matters():
    case = next(case for case in JOINT if case.name == "prx")
    model = case.model().requires_grad_(False)
    for site in measure_moments(model, [case.inputs(8, 8)]).sites:
        assert [error < 1e-9 for _, error in site.far] == [True] and site.sensitivity > 0
