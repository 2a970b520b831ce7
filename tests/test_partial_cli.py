"""`convfusion curve`, and `convert` of a part of the sites."""

import pytest

import convfusion
from convfusion.families import denoiser_of, list_sites
from convfusion.surgery import mixers_of


def test_curve_then_convert(run, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\ngreen apple\nred\ngreen\n")
    cache, out = tmp_path / "cache", tmp_path / "curve"
    code, _, err = run("cache", model, "--data", prompts, "--out", cache, "--steps", 1)
    assert code == 0, err
    options = ("--steps", 1, "--batch-size", 2, "--held-out", 1, "--sites", 2)
    code, text, err = run("curve", model, "--data", cache, "--out", out, *options)
    assert code == 0, err
    assert "cheapest-02.json" in text
    code, text, err = run(
        "convert", model, "--config", out / "cheapest-02.json", "--out", tmp_path / "converted"
    )
    assert code == 0, err
    assert "2 of 7 self-attention sites converted" in text
    code, _, err = run("curve", model, "--data", cache, "--out", out, *options)
    assert code == 2 and "not empty" in err

    stopped = tmp_path / "stopped"  # while it drew its data
    (stopped / "cache").mkdir(parents=True)
    code, _, err = run("curve", model, "--data", prompts, "--out", stopped, *options)
    assert code == 0, err


def test_convert_every(run, model, tmp_path):
    code, text, err = run(
        "convert", model, "--every", 3, "--first", 1, "--out", tmp_path / "converted"
    )
    assert code == 0, err
    assert "2 of 7 self-attention sites converted" in text
    found = convfusion.load_pipeline(tmp_path / "converted")
    paths = [site.path for site in list_sites(denoiser_of(found))]
    assert list(mixers_of(found)) == paths[1::3]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["convert", "--every", 2, "--first", 7], "chooses none of 7"),
        (["convert", "--first", 1], "--first goes with --every"),
        (["convert", "--every", 2, "--blocks", "b"], "give --blocks, or"),
        (["curve"], "--data is needed"),
        (["curve", "--data", "nowhere"], "nowhere does not exist"),
        (["curve", "--data", "PROMPTS", "--sites", 8], "8 sites cannot be chosen"),
        (["curve", "--data", "PROMPTS", "--by", "size"], "imitation or epsilon"),
        (["curve", "--data", "PROMPTS", "--learning-rate", 0], "must be positive"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(run, model, tmp_path, options, complaint):
    (tmp_path / "prompts.txt").write_text("red apple\n")
    command, *rest = [tmp_path / "prompts.txt" if o == "PROMPTS" else o for o in options]
    code, _, err = run(command, model, "--out", tmp_path / "out", *rest)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
