"""Distances and scores of features, against closed forms, second implementations and laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from convfusion import ConvFusionError
from convfusion.evaluate import (
    clip_scores,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
    psnr,
    ssim,
)

PROPERTY = settings(max_examples=25, deadline=None)


class Given(torch.nn.Module):
    """Features that are there already, for metrics that want a network."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features.flatten(1)


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def with_moments(mean, covariance, n, seed=0):
    """n points whose sample mean and unbiased covariance are exactly these."""
    points = normal(n, len(mean), seed)
    points = points - points.mean(dim=0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(points.T @ points / (n - 1)))
    return points @ whiten.T @ torch.linalg.cholesky(covariance).T + mean


def covariance(d, seed):
    root = normal(d, d, seed)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("n", [8, 40])
def test_frechet_distance_of_gaussians_along_the_axes(n):
    """For diagonal covariances: Σ (μ − μ')² + Σ (σ − σ')²."""
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.1]], dtype=torch.float64)
    one, other = (
        with_moments(m, torch.diag(s**2), n, i)
        for i, (m, s) in enumerate(zip(means, deviations, strict=True))
    )
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_share_axes():
    """Against the square root of a matrix by its eigenvectors, Σ^½ (Σ^½ Σ' Σ^½)^½ …"""

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.sqrt()) @ vectors.T

    zero = torch.zeros(4, dtype=torch.float64)
    first, second = covariance(4, 1), covariance(4, 2)
    shared = root(root(first) @ second @ root(first)).trace()
    expected = first.trace() + second.trace() - 2 * shared
    found = frechet_distance(with_moments(zero, first, 30), with_moments(zero, second, 50, 1))
    assert found == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("n", [200, 10])  # more pictures than features, and fewer
def test_frechet_distance_agrees_with_torchmetrics(n):
    one, other = normal(n, 16), normal(n + 5, 16, 1, scale=1.5, shift=0.3)
    theirs = FrechetInceptionDistance(feature=Given(16)).set_dtype(torch.float64)
    theirs.update(one[:, :, None, None], real=True)
    theirs.update(other[:, :, None, None], real=False)
    assert frechet_distance(one, other) == pytest.approx(theirs.compute().item(), rel=1e-4)


sizes = st.integers(2, 30)


@PROPERTY
@given(n=sizes, m=sizes, d=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_frechet_distance_is_a_distance(n, m, d, seed, scale):
    one, other = normal(n, d, seed, scale), normal(m, d, seed + 1, 2 * scale, shift=scale)
    found = frechet_distance(one, other)
    assert found >= 0
    assert frechet_distance(other, one) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * scale**2)
    order = torch.randperm(n)
    turn = torch.linalg.qr(normal(d, d, seed)).Q
    assert frechet_distance(one[order] @ turn, other @ turn) == pytest.approx(found, rel=1e-7)
    far = frechet_distance(one + 7 * scale, other + 7 * scale)
    assert far == pytest.approx(found, rel=1e-6)


def test_kernel_distance_is_the_sum_over_pairs_that_its_definition_names():
    one, other = normal(5, 3), normal(4, 3, 1, shift=0.5)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    own = np.mean([kernel(x, y) for i, x in enumerate(one) for j, y in enumerate(one) if i != j])
    theirs = [kernel(x, y) for i, x in enumerate(other) for j, y in enumerate(other) if i != j]
    across = np.mean([kernel(x, y) for x in one for y in other])
    expected = own + np.mean(theirs) - 2 * across
    assert kernel_distance(one, other).value == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_agrees_with_torchmetrics():
    """Its subsets can only be chosen to be the whole sets."""
    one, other = normal(60, 8), normal(60, 8, 1, shift=0.2)
    theirs = KernelInceptionDistance(feature=Given(8), subsets=2, subset_size=60)
    theirs.update(one[:, :, None, None], real=True)
    theirs.update(other[:, :, None, None], real=False)
    mean, deviation = theirs.compute()
    assert deviation < 1e-6
    assert kernel_distance(one, other).value == pytest.approx(mean.item(), rel=1e-5)


def test_kernel_distance_has_no_bias():
    """Over many draws of one distribution: 0 on average."""
    same = [kernel_distance(normal(40, 4, 2 * i), normal(40, 4, 2 * i + 1)).value
            for i in range(200)]  # fmt: skip
    assert abs(np.mean(same)) < 4 * np.std(same) / len(same) ** 0.5
    assert 0.3 < np.mean(np.array(same) < 0) < 0.8


@pytest.mark.parametrize("n, m", [(60, 60), (60, 200), (20, 150)])
@pytest.mark.parametrize("shift, most", [(0.5, 1.5), (0.0, 2.2)])
def test_kernel_distance_knows_its_error(n, m, shift, most):
    """Of the spread of many draws; it is too large where the sets are of one distribution."""
    found = [
        kernel_distance(normal(n, 16, 2 * i), normal(m, 16, 2 * i + 1, shift=shift))
        for i in range(60)
    ]
    told = np.mean([each.error for each in found]) / np.std([each.value for each in found])
    assert 0.75 < told < most


def test_pairs_and_differences_know_their_error():
    """Two sets that drew the same prompts, against a third that did, and against strangers."""
    differences, strangers = [], []
    for i in range(60):
        prompts = normal(60, 16, 5 * i)
        near, far, third = (prompts + 0.5 * normal(60, 16, 5 * i + k) for k in (1, 2, 3))
        far, rest = far + 0.2, normal(80, 16, 5 * i + 4)
        own, other = (kernel_distance(each, third, paired=True) for each in (near, far))
        differences.append(other - own)
        strangers.append(kernel_distance(far, rest) - kernel_distance(near, rest))
    for found in (differences, strangers):
        told = np.mean([each.error for each in found])
        assert told == pytest.approx(np.std([each.value for each in found]), rel=0.35)


def test_what_is_left_out_is_what_the_rest_has():
    one, other = normal(5, 3), normal(5, 3, 1, shift=0.5)
    found = kernel_distance(one, other)
    pairs = kernel_distance(one, other, paired=True)
    rest = [k for k in range(5) if k != 2]
    for got, expected in (
        (found.left_out[0][2], kernel_distance(one[rest], other)),
        (found.left_out[1][2], kernel_distance(one, other[rest])),
        (pairs.left_out[0][2], kernel_distance(one[rest], other[rest])),
    ):
        assert got.item() == pytest.approx(expected.value, rel=1e-9)
    with pytest.raises(ConvFusionError, match="not 5 and 4"):
        kernel_distance(one, other[rest], paired=True)


def test_two_rows_have_no_error():
    assert kernel_distance(normal(2, 4, 0), normal(9, 4, 1)).error is None
    assert kernel_distance(normal(3, 4, 0), normal(9, 4, 1)).error > 0


def test_fréchet_distance_of_few_pictures_is_mostly_bias():
    """The claim of the report: of one distribution, it falls as 1/n and the kernel's does not."""
    few, many = (frechet_distance(normal(n, 32), normal(n, 32, 1)) for n in (16, 1024))
    assert few > 20 * many
    assert abs(kernel_distance(normal(16, 32), normal(16, 32, 1)).value) < 0.1


def line(*points):
    return torch.tensor(points, dtype=torch.float64)[:, None]


def test_neighbourhoods_on_a_line():
    """Radii of the reference 0, 1, 2, 10 by the nearest other point: 1, 1, 1, 8."""
    reference = line(0, 1, 2, 10)
    found = neighbourhoods(line(0.5, 2.5, 30), reference, k=1, k_density=1)
    assert found.precision == pytest.approx(2 / 3)  # 30 lies in no ball
    # 0.5 lies in the balls of 0 and 1; 2.5 in those of 2 and 10.
    assert found.density == pytest.approx(4 / 3)
    assert found.coverage == pytest.approx(4 / 4)
    # Radii of the pictures: 2, 2, 27.5; the first two reach 0, 1, 2, and 30 reaches 10.
    assert found.recall == 1
    found = neighbourhoods(line(0.5, 2.5, 3.5), reference, k=1, k_density=1)
    assert found.recall == pytest.approx(3 / 4)


@PROPERTY
@given(n=st.integers(6, 40), d=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_set_lies_within_itself(n, d, seed):
    points = normal(n, d, seed)
    found = neighbourhoods(points, points)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    # Every ball of k = 5 holds its centre and its five nearest.
    assert found.density == pytest.approx(6 / 5)


@PROPERTY
@given(n=st.integers(6, 30), m=st.integers(6, 30), seed=st.integers(0, 99))
def test_precision_and_recall_trade_places(n, m, seed):
    one, other = normal(n, 3, seed), normal(m, 3, seed + 1, shift=0.5)
    there, back = neighbourhoods(one, other), neighbourhoods(other, one)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    far = neighbourhoods(one, other + 1e6)
    assert far.precision == far.recall == far.density == far.coverage == 0


def test_neighbourhoods_of_one_distribution_and_of_a_collapse():
    pictures, reference = normal(400, 4), normal(400, 4, 1)
    alike = neighbourhoods(pictures, reference)
    assert alike.density == pytest.approx(1, abs=0.15)
    assert alike.coverage == pytest.approx(1 - 2**-5, abs=0.05)
    collapsed = neighbourhoods(0.1 * pictures, reference)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.2 and collapsed.coverage < 0.5


def test_large_sets_are_taken_in_parts(monkeypatch):
    one, other = normal(50, 3), normal(43, 3, 1)
    whole = neighbourhoods(one, other), kernel_distance(one, other).value
    monkeypatch.setattr("convfusion.evaluate.scores.ROWS", 7)
    assert neighbourhoods(one, other) == whole[0]
    assert kernel_distance(one, other).value == pytest.approx(whole[1], rel=1e-10)


def test_inception_score_of_known_logits():
    sure = 1e3 * torch.eye(5)
    assert inception_score(sure) == pytest.approx(5)  # one class each
    assert inception_score(sure[[0, 0, 1, 1]]) == pytest.approx(2)
    assert inception_score(torch.zeros(7, 5)) == pytest.approx(1)


def test_inception_score_agrees_with_torchmetrics():
    logits = normal(50, 10, scale=3)
    theirs = InceptionScore(feature=Given(10), splits=1)
    theirs.update(logits[:, :, None, None])
    assert inception_score(logits) == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def test_clip_scores_are_cosines_without_the_negative_ones():
    pictures = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = clip_scores(pictures, texts)
    torch.testing.assert_close(found, torch.tensor([100, 100 / math.sqrt(2), 0]).double())


def test_ssim_against_its_formula_and_a_constant():
    """Of two constant pictures only the means differ: (2ab + c)/(a² + b² + c), c = (0.01·255)²."""
    one, other = (np.full((16, 20, 3), value, np.uint8) for value in (100, 150))
    c = (0.01 * 255) ** 2
    assert ssim(one, other) == pytest.approx((2 * 15000 + c) / (100**2 + 150**2 + c))
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert ssim(noise, noise) == pytest.approx(1)
    assert ssim(noise, noise[::-1].copy()) < 0.5


def test_ssim_is_the_mean_over_gaussian_windows():
    """Wang et al.'s formula by hand: 11 × 11, σ = 1.5, beyond the border the picture mirrored."""
    rng = np.random.default_rng(0)
    pair = rng.integers(0, 256, (2, 12, 13, 3)).astype(np.uint8)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    x_all, y_all = np.pad(pair.astype(float), [(0, 0), (5, 5), (5, 5), (0, 0)], mode="reflect")
    expected = []
    for i, j in np.ndindex(12, 13):
        x, y = (each[i : i + 11, j : j + 11] for each in (x_all, y_all))
        a, b, aa, bb, ab = ((window * p).sum((0, 1)) for p in (x, y, x * x, y * y, x * y))
        both = (2 * a * b + c1) * (2 * (ab - a * b) + c2)
        expected.append(both / ((a**2 + b**2 + c1) * (aa - a**2 + bb - b**2 + c2)))
    assert ssim(*pair) == pytest.approx(np.mean(expected), rel=1e-6)
    assert psnr(pair[0], pair[0]) == float("inf")


BAD = {
    "one picture": (torch.zeros(1, 3), torch.zeros(4, 3), "two pictures or more"),
    "no features": (torch.zeros(4), torch.zeros(4), "features must be"),
    "other network": (torch.zeros(4, 3), torch.zeros(4, 2), "features of 2 and 3 numbers"),
    "not finite": (torch.full((4, 3), math.nan), torch.zeros(4, 3), "not finite"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, neighbourhoods])
def test_what_cannot_be_compared_is_named(metric, case):
    one, other, message = BAD[case]
    with pytest.raises(ConvFusionError, match=message):
        metric(one, other)


def test_too_few_pictures_have_no_neighbours():
    with pytest.raises(ConvFusionError, match="at least 6 are needed"):
        neighbourhoods(normal(5, 3), normal(20, 3))


def test_float32_features_are_worked_on_in_float64():
    """Far from the origin, where float32 would lose the spread."""
    one, other = normal(50, 4), normal(50, 4, 1, scale=2)
    exact = frechet_distance(one, other)
    moved = frechet_distance((one + 4096).float(), (other + 4096).float())
    assert moved == pytest.approx(exact, rel=1e-3)
