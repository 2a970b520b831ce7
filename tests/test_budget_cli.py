"""`--budget` in `plan`, `convert` and `curve`, from the command line."""

from __future__ import annotations

import re

import pytest
from made_up import made_up_moments

import convfusion
from convfusion.budget import Moments
from convfusion.cli.models import open_stock_pipeline
from convfusion.families import denoiser_of
from convfusion.fingerprint import fingerprint
from convfusion.mixers import Halo
from convfusion.surgery import mixers_of


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\ngreen apple\n")
    return file


@pytest.fixture
def moments(model, tmp_path):
    denoiser = denoiser_of(open_stock_pipeline(str(model), "float32", "cpu"))
    made_up_moments(denoiser, (8, 8), fingerprint(denoiser)).save(tmp_path / "moments.json")
    return tmp_path / "moments.json"


def test_a_plan_of_a_model_by_name(run):
    code, text, err = run("plan", "sd15", "--size", "512x512", "--budget", "8x")
    assert code == 0, err
    assert text.count("halo") == 16 + 1  # a line for each site, and the sentence
    saving = float(re.search(r"take (\S+)× fewer operations", text)[1])
    assert 8 <= saving < 9 and "Nothing was measured" in text


def test_a_plan_by_moments_names_the_command_that_does_it(run, model, moments):
    code, text, err = run(
        "plan", model, "--size", "32x32", "--budget", "2x", "--moments", moments, "--keep", 1
    )
    assert code == 0, err
    assert "Expected ε-error" in text and "attention" in text
    assert f"convert {model} --budget 2x --moments {moments} --keep 1" in text


def test_convert_within_a_budget_without_moments(run, model, tmp_path):
    code, text, err = run("convert", model, "--budget", "1.2x", "--out", tmp_path / "out")
    assert code == 0, err
    assert "Nothing was measured" in text
    mixers = mixers_of(convfusion.load_pipeline(tmp_path / "out"))
    assert len(mixers) == 7 and len({mixer.config for mixer in mixers.values()}) == 1
    assert all(isinstance(mixer.config, Halo) for mixer in mixers.values())


def test_convert_measures_and_writes_moments_which_convert_then_reads(
    run, model, prompts, tmp_path
):
    file, out = tmp_path / "moments.json", tmp_path / "out"
    options = ("--budget", "2x", "--moments", file)
    code, text, err = run("convert", model, *options, "--measure", prompts, "--out", out)
    assert code == 0, err
    assert "predicted for this choice" in text and Moments.load(file).sites
    code, again, err = run("convert", model, *options, "--out", tmp_path / "again")
    assert code == 0, err
    first, second = (
        {path: mixer.config for path, mixer in mixers_of(convfusion.load_pipeline(each)).items()}
        for each in (out, tmp_path / "again")
    )
    assert first == second and "Expected ε-error" in again


def test_curve_draws_errors_within_budgets(run, model, moments, prompts, tmp_path):
    out = tmp_path / "curve"
    options = ("--data", prompts, "--held-out", 1, "--batch-size", 2)
    code, text, err = run("curve", model, "--moments", moments, "--out", out, *options)
    assert code == 0, err
    assert (out / "budget.csv").is_file() and (out / "budget.png").is_file()
    assert "by moments" in text and "--budget 4x" in text


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["convert", "--budget", "four"], "looks like 4x"),
        (["convert", "--budget", "0.5x"], "more than 1x"),
        (["convert", "--budget", "9999x"], "x can be had"),
        (["convert", "--budget", "2x", "--config", "default"], "leave --config"),
        (["convert", "--budget", "2x", "--keep", 2], "needs moments"),
        (["convert", "--budget", "2x", "--size", "7x7"], "cannot be drawn"),
        (["convert", "--moments", "MOMENTS"], "go with --budget"),
        (["convert", "--keep", 1], "go with --budget"),
        (["convert", "--size", "32x32"], "--size goes with"),
        (["convert", "--budget", "2x", "--moments", "nowhere.json"], "nowhere.json"),
        (["convert", "--budget", "2x", "--moments", "MOMENTS", "--keep", 7], "at least one"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    run, model, moments, tmp_path, options, complaint
):
    command, *rest = [moments if option == "MOMENTS" else option for option in options]
    code, _, err = run(command, model, "--out", tmp_path / "out", *rest)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_a_plan_takes_a_budget_or_a_config(run):
    code, _, err = run("plan", "sd15", "--size", "512x512", "--budget", "8x", "--config", "default")
    assert code == 2 and "--budget or --config" in err
    code, _, err = run("plan", "sd15", "--size", "512x512", "--budget", "1s")
    assert code == 2 and "needs moments" in err
