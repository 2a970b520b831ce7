"""Standard errors of scores: over prompts, since pictures of one prompt are alike."""

import csv
import json

import numpy as np
import pytest
import torch
from evaluations import PROMPTS, make_settings, student, thumbnails
from PIL import Image

from convfusion import ConvFusionError
from convfusion.analysis import ablate, list_variants
from convfusion.evaluate import evaluate, inception_score, kernel_distance, mean_psnr, psnr
from convfusion.evaluate.measure import Distribution
from convfusion.evaluate.scores import mean_of, standard_error
from convfusion.evaluate.verdict import compare_with_chance
from convfusion.report import format_psnr

COUNT, SEEDS, WIDTH = 12, 8, 16  # prompts, samples of each, features
NAMES = [f"prompt {i}" for i in range(COUNT) for _ in range(SEEDS)]


def drawn(rng, features):
    """Features of some samples of each prompt, which differ little."""
    noise = 0.3 * rng.normal(size=(COUNT * SEEDS, WIDTH))
    return torch.tensor(np.repeat(features, SEEDS, axis=0) + noise)


def test_chance_between_prompts_is_seldom_beyond_two_errors():
    """Student and teacher differ by prompt in either direction, and in nothing on average."""
    rng = np.random.default_rng(0)
    excesses, means = [], []
    for _ in range(100):
        prompts = rng.normal(size=(COUNT, WIDTH))
        shifts = [0.5 * rng.normal(size=(COUNT, WIDTH)) for _ in range(2)]
        one, teacher, other = (drawn(rng, prompts + each) for each in (*shifts, 0))
        options = {"paired": True, "prompts": NAMES}
        own, floor = (kernel_distance(each, other, **options) for each in (one, teacher))
        excesses.append(own - floor)
        scores = np.repeat(rng.normal(size=COUNT), SEEDS) + 0.3 * rng.normal(size=COUNT * SEEDS)
        means.append(mean_of(scores.tolist(), NAMES))
    for found in (excesses, means):
        values, errors = (
            np.array([getattr(f, name) for f in found]) for name in ("value", "error")
        )
        assert np.mean(np.abs(values) > 2 * errors) < 0.15
        assert 0.7 < np.mean(errors) / np.std(values) < 1.6


def test_what_is_left_out_is_a_whole_prompt():
    """In any order of the rows, and whether or not the other set has the same prompts."""
    names = ["a", "b", "c", "a", "b", "a", "c", "d"]
    one, other = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)).double()
    found = kernel_distance(one, other, prompts=names)
    pairs = kernel_distance(one, other, paired=True, prompts=names)
    assert [len(left) for left in (*found.left_out, *pairs.left_out)] == [4, 8, 4]
    for number, name in enumerate("abcd"):
        rest = [i for i, each in enumerate(names) if each != name]
        for got, expected in (
            (found.left_out[0], kernel_distance(one[rest], other)),
            (pairs.left_out[0], kernel_distance(one[rest], other[rest])),
        ):
            assert got[number].item() == pytest.approx(expected.value, rel=1e-9)


def test_the_error_of_a_mean_is_that_of_the_means_of_prompts():
    values = [1.0, 5.0, 2.0, 8.0, 0.0, 1.0]
    means = [np.mean(values[k::3]) for k in range(3)]
    assert standard_error(values, [*"abc"] * 2) == pytest.approx(np.std(means, ddof=1) / 3**0.5)
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 6**0.5)
    assert mean_of(values, ["a"] * 6) == (pytest.approx(17 / 6), None)
    assert mean_of([]) == (None, None)
    for function in (standard_error, mean_of):
        with pytest.raises(ConvFusionError, match="each of 6 rows, not 2"):
            function(values, ["a", "b"])


def test_every_error_of_an_evaluation_is_over_prompts(tmp_path):
    """Three prompts at four seeds: no error is that of twelve samples."""
    found = evaluate(student(), make_settings(samples=12), tmp_path, extractor=thumbnails())
    with open(tmp_path / "evaluation.csv", newline="", encoding="utf-8") as file:
        rows = {(r["metric"], r["pictures"]): r["standard_error"] for r in csv.DictReader(file)}
    for metric in ("psnr", "ssim", "cosine", "epsilon_error", "latent_error"):
        held = [each if metric.endswith("_error") else each.student for each in found.samples]
        values = [getattr(each, metric) for each in held]
        means = [np.mean(values[k::3]) for k in range(3)]
        expected = np.std(means, ddof=1) / 3**0.5
        assert float(rows[metric, "student"]) == pytest.approx(expected), metric
    features = {
        side: thumbnails()([Image.open(p) for p in sorted((tmp_path / side).iterdir())]).features
        for side in ("student", "teacher", "teacher-other-seed")
    }
    excess = [
        kernel_distance(
            features[side], features["teacher-other-seed"], paired=True, prompts=PROMPTS * 4
        )
        for side in ("student", "teacher")
    ]
    told = found.distributions[0]
    assert told.kid_error == excess[0].error
    assert told.kid_excess_error == (excess[0] - excess[1]).error
    assert "12 pictures of 3 prompts are too few" in (tmp_path / "report.html").read_text()


def test_seeds_of_one_prompt_have_no_error(tmp_path):
    found = evaluate(
        student(), make_settings(prompts=["red"], samples=6), tmp_path, extractor=thumbnails()
    )
    assert found.distributions[0].kid_error is None
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert told["distributions"][0]["kid_excess_error"] is None


def test_a_mean_psnr_is_that_of_each_picture_with_its_error():
    """Not that of all pixels together; equal pictures have none and are left out."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(3)]
    near = [images[0], np.clip(images[1].astype(int) + 2, 0, 255), 255 - images[2]]
    values = [psnr(near[k], images[k]) for k in (1, 2)]
    found = mean_psnr(near, images)
    assert found.value == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(np.std(values, ddof=1) / 2**0.5)
    assert mean_psnr(images, images) == (None, None)
    assert mean_psnr(near, images, ["a", "b", "b"]).error is None
    assert format_psnr(*found) == f"{found.value:.1f} ± {found.error:.1f} dB"
    assert format_psnr(*mean_psnr(images, images)) == "equal"


def test_an_ablation_tells_the_same_psnr_as_an_evaluation():
    from tiny_pipelines import stable_diffusion

    prompts = ["red", "green", "apple"]
    found = ablate(stable_diffusion(), prompts, list_variants([3]), steps=2)
    stock = found.pop("self-attention")
    assert (stock.psnr, stock.psnr_error) == (None, None)
    for row in found.values():
        told = row.to_dict()
        assert (told["psnr"], told["psnr_error"]) == mean_psnr(row.images, stock.images)
        assert told["psnr_error"] > 0


def test_scores_are_worked_out_in_float64():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(1)
    exact = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert abs(inception_score(logits) - exact) < 1e-12


def test_the_verdict_says_whether_a_set_is_further_than_chance():
    """Two standard errors are the bound, and too few prompts are no sets."""

    def compare(excess, error, prompts=20):
        row = Distribution(
            "student", "teacher-other-seed", 60, 60, 1, 0, error, excess, error, *4 * [1]
        )
        return compare_with_chance(row, prompts)

    assert "further from" in compare(3e-3, 1e-3)
    assert "nearer to" in compare(-3e-3, 1e-3)
    assert "no further" in compare(1e-3, 1e-3)
    assert "less than 2.0 would not show" in compare(1e-3, 1e-3)
    assert "60 pictures of 4 prompts are too few" in compare(3e-3, 1e-3, prompts=4)
