"""Budgets for models whose tokens lie in frames: moments of a tiny Wan, and what is chosen."""

import pytest
import torch
from tiny_models import CASES
from tiny_pipelines import wan
from typer.testing import CliRunner

import convfusion
from convfusion.bench.models import denoiser_on_meta, full_size_configs
from convfusion.budget import Moments, choose_mixers, measure_moments
from convfusion.budget.candidates import covers
from convfusion.budget.measure import list_reaches
from convfusion.budget.moments import Reach
from convfusion.cli import app
from convfusion.families import example_inputs, list_sites
from convfusion.mixers import Halo, MeanOnly
from convfusion.surgery import start_from_attention

SIZE = (4, 12, 14)


@pytest.fixture(scope="module")
def measured():
    model = next(case for case in CASES if case.name == "wan").model()
    model.requires_grad_(False)
    calls = [example_inputs(model, SIZE, batch=2, words=5)]
    return model, calls, measure_moments(model, calls)


def test_moments_of_a_video_model_and_their_file(measured, tmp_path):
    model, _, moments = measured
    assert moments.latents == SIZE and not convfusion.status(model).converted
    for site in moments.sites:
        assert site.grid == (4, 6, 7)
        assert dict(site.scores)[1.0] == dict(site.values)[1.0] == 0
        assert all(len(reach.window) == 3 for reach, _ in site.far)
    moments.save(tmp_path / "moments.json")
    assert Moments.load(tmp_path / "moments.json") == moments


def test_packed_latents_have_the_sides_that_the_model_is_told():
    case = next(case for case in CASES if case.name == "ltx")
    model = case.model().requires_grad_(False)
    assert measure_moments(model, [case.inputs(4, 6)]).latents == (2, 4, 6)


def test_a_budget_is_kept_and_what_is_chosen_starts(measured):
    model, calls, moments = measured
    chosen = choose_mixers(model, "1.5x", moments=moments)
    assert chosen.saving >= 1.5 and chosen.latents == SIZE
    assert "14×12 and 4 frames" in str(chosen)
    assert all(
        site.mixer is None or isinstance(site.mixer, MeanOnly) or 3 in site.mixer.build(24, 2).ranks
        for site in chosen.sites
    )
    larger = choose_mixers(model, "1.5x", moments=moments, size=(24, 28))
    assert {site.grid for site in larger.sites} == {(4, 12, 14)}
    convfusion.convert(model, chosen.config())
    with torch.no_grad():
        start_from_attention(model, calls)
    convfusion.revert(model)


def test_without_moments_every_site_has_the_same_block():
    model = denoiser_on_meta(*full_size_configs()["wan-1.3b"])
    chosen = choose_mixers(model, "10x", size=(60, 104))
    assert chosen.latents == (21, 60, 104) and "104×60 and 21 frames" in str(chosen)
    (mixer,) = {site.mixer for site in chosen.sites}
    assert isinstance(mixer, Halo) and mixer.window == (4, 8, 8)
    assert len(chosen.sites) == len(list_sites(model)) == 30 and chosen.saving >= 10


def test_reaches_end_where_a_window_holds_the_video():
    reaches = list_reaches((21, 30, 52))
    assert len(reaches) == 9 and all(len(reach.cells) == 3 for reach in reaches)
    few = list_reaches((4, 8, 8))
    assert covers(few[-1], (4, 8, 8)) and not any(covers(r, (4, 8, 8)) for r in few[:-1])
    assert not covers(Reach((2, 4, 4), (4, 8, 8), (1, 1, 1)), (5, 8, 8))


def test_the_command_plans_for_the_frames_that_are_told(tmp_path):
    folder = tmp_path / "tiny-wan"
    wan().save_pretrained(folder)

    def run(*words):
        shown = CliRunner().invoke(app, ["plan", *map(str, words), "--size", "16x16"])
        return f"{shown.output} {shown.exception}"

    assert "2 frames of latents, batch 2" in run(folder, "--frames", 5)
    within = run(folder, "--frames", 5, "--budget", "2x")
    assert "2 frames all sites together" in within and "--frames 5" in within
    assert "1 more than a multiple of 4" in run(folder, "--frames", 6)
    assert "draws pictures" in run("mini", "--frames", 5)
    assert "--frames needs a pipeline" in run("wan-1.3b", "--frames", 5, "--budget", "2x")
