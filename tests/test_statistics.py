"""Statistics of attention made by hand, against closed forms and sums written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convfusion import ConvFusionError
from convfusion.analysis.statistics import (
    HighPass,
    attention_score_mass,
    bias_share,
    chebyshev,
    entropy,
    fit_decay,
    growth_exponent,
    high_pass,
    mass_within,
    receptive_field,
    sink_tokens,
    windows,
)
from convfusion.analysis.streaming import Measure, measure_attention, measure_map, summarise
from convfusion.mixers.offsets import ring_sums

GRIDS = [(8, 8), (16, 16), (7, 12), (5, 5), (9, 4)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")


def all_queries(grid):
    return torch.arange(grid[0] * grid[1])


def curve(maps, grid, queries=None):
    """ASM of maps [Q, N] at every window."""
    queries = all_queries(grid) if queries is None else queries
    return attention_score_mass(ring_sums(maps[None], chebyshev(queries, grid), max(grid)))[0]


def gaussian(grid, width, shift=(0, 0)):
    """Attention that falls off as a Gaussian of standard deviation `width` round the query."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    by_row = torch.exp(-((rows[None] - rows[:, None] - shift[0]) ** 2) / (2 * width**2))
    by_column = torch.exp(-((columns[None] - columns[:, None] - shift[1]) ** 2) / (2 * width**2))
    maps = torch.einsum("ik,jl->ijkl", by_row, by_column).flatten(2).flatten(0, 1)
    return maps / maps.sum(-1, keepdim=True)


def statistics_of(maps, grid):
    return summarise(measure_map(maps.float(), grid, Measure(queries=maps.shape[0] + 8)))[0]


def covered_share(grid):
    """The mean share of the grid in a clipped window, at K = 1, 3, 5, …, side by side."""

    def along(side, d):
        ends = [min(i + d, side - 1) - max(i - d, 0) + 1 for i in range(side)]
        return sum(ends) / side**2

    return [along(grid[0], d) * along(grid[1], d) for d in range(max(grid))]


@every_grid
def test_uniform_attention_covers_the_share_of_the_grid_and_has_no_high_part(grid):
    tokens = grid[0] * grid[1]
    maps = torch.full((tokens, tokens), 1 / tokens)
    assert curve(maps, grid).tolist() == pytest.approx(covered_share(grid), abs=1e-9)
    found = statistics_of(maps, grid)
    assert found.high_share < 1e-10
    assert found.receptive_field is None and found.score_mass_high is None
    assert found.bias_share == pytest.approx(1) and found.bias_share_low == pytest.approx(1)
    assert found.entropy == pytest.approx(1, abs=1e-6)
    assert found.decay is None or found.decay.best == "none"
    assert found.sink_mass == 0


@every_grid
def test_one_hot_attention_is_all_at_the_query(grid):
    maps = torch.eye(grid[0] * grid[1])
    assert curve(maps, grid).tolist() == [1.0] * max(grid)
    found = statistics_of(maps, grid)
    assert found.entropy == pytest.approx(0, abs=1e-6)
    assert found.bias_share == pytest.approx(0, abs=1e-6)
    assert found.sink_mass == 0
    # Λ of a delta is the filter's own kernel, the inverse transform of its response.
    response = HighPass().response(grid)
    kernel = torch.fft.irfft2(response.to(torch.complex128), s=grid)
    assert found.high_share == pytest.approx(kernel.square().sum().item(), rel=1e-5)
    middle = (grid[0] // 2) * grid[1] + grid[1] // 2
    moved = torch.roll(kernel, (grid[0] // 2, grid[1] // 2), (0, 1)).flatten()
    assert torch.allclose(high_pass(maps[middle], grid, response).double(), moved, atol=1e-6)


@pytest.mark.parametrize("width", [0.8, 1.5, 3.0])
def test_a_gaussian_has_the_mass_of_its_normal_distribution(width):
    grid = (25, 25)
    middle = torch.tensor([12 * 25 + 12])
    found = curve(gaussian(grid, width)[middle], grid, middle)
    weights = [math.exp(-(x**2) / (2 * width**2)) for x in range(-12, 13)]
    for d, mass in enumerate(found.tolist()):
        along = sum(weights[max(0, 12 - d) : 13 + d]) / sum(weights)
        assert mass == pytest.approx(along**2, abs=1e-9)
    # And the integral of the density, as far as a grid follows it.
    if width > 1:
        for d in range(3, 10):
            integral = math.erf((d + 0.5) / (width * math.sqrt(2))) ** 2
            assert found[d].item() == pytest.approx(integral, abs=5e-3)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("cutoff", [0.5, 1.0])
def test_the_receptive_field_of_a_gaussian_is_that_of_its_mass(side, cutoff):
    """The high-pass keeps what is narrow: within a ring of the field of the map itself."""
    for width in (0.5, 1.0, side / 16, side / 10):
        maps = gaussian((side, side), width)
        config = Measure(HighPass(cutoff), queries=side**2)
        found = summarise(measure_map(maps.float(), (side, side), config))[0]
        own = receptive_field(curve(maps, (side, side)))
        assert abs(found.receptive_field - own) <= 2
        assert found.receptive_field_magnitude >= found.receptive_field  # the trough counts


def test_a_moved_gaussian_needs_a_window_that_reaches_it():
    grid = (32, 32)
    middle = torch.tensor([16 * 32 + 16])
    for shift in (0, 4, 8):
        mass = curve(gaussian(grid, 0.5, (0, shift))[middle], grid, middle)
        assert receptive_field(mass, 0.5) == 2 * shift + 1
        assert mass[max(0, shift - 3)] < 0.01 or shift == 0


def test_a_sink_is_found_and_one_bias():
    grid = (10, 10)
    maps = torch.full((100, 100), 0.1 / 99)
    maps[:, 99] = 0.9
    found = statistics_of(maps, grid)
    assert found.sink_mass == pytest.approx(0.9, abs=1e-6)
    assert found.bias_share == pytest.approx(1)
    assert sink_tokens(maps.sum(0), maps.square().sum(0), 100).nonzero().tolist() == [[99]]


def test_local_attention_of_a_few_queries_is_no_sink():
    """A sampled query's own neighbourhood receives much, but from that one query alone."""
    grid = (64, 64)
    config = Measure(queries=32)
    queries = config.chosen_queries(grid)
    maps = torch.zeros(32, 64 * 64)
    maps[torch.arange(32), queries] = 1.0
    assert summarise(measure_map(maps, grid, config))[0].sink_mass == 0


@every_grid
@pytest.mark.parametrize("part", [0.25, 0.7])
def test_a_mixture_is_the_mixture_of_its_parts(grid, part):
    """Score mass and the high-frequency part are linear; bias shares follow from the energies."""
    tokens = grid[0] * grid[1]
    one, other = torch.eye(tokens), torch.full((tokens, tokens), 1 / tokens)
    mixed = part * one + (1 - part) * other
    expected = part * curve(one, grid) + (1 - part) * curve(other, grid)
    assert torch.allclose(curve(mixed, grid), expected, atol=1e-6)
    found, local = statistics_of(mixed, grid), statistics_of(one, grid)
    assert found.receptive_field == local.receptive_field  # uniform attention has no Λ
    assert found.score_mass_high == pytest.approx(local.score_mass_high, abs=1e-4)
    overlap = (1 - part**2) / tokens  # ⟨A_q, A_q'⟩ of two queries
    energy = part**2 + (1 - part**2) / tokens  # ‖A_q‖²
    assert found.bias_share == pytest.approx(overlap / energy, rel=1e-4)


def test_border_queries_have_clipped_windows():
    grid = (6, 9)
    corner = torch.tensor([0])
    uniform = torch.full((1, 54), 1 / 54)
    expected = [min(6, d + 1) * min(9, d + 1) / 54 for d in range(9)]
    assert curve(uniform, grid, corner).tolist() == pytest.approx(expected)


@every_grid
def test_distances_and_windows(grid):
    height, width = grid
    distances = chebyshev(all_queries(grid), grid)
    for query, key in [(0, height * width - 1), (width, 1), (height * width // 2, 3)]:
        rows = abs(query // width - key // width)
        assert distances[query, key] == max(rows, abs(query % width - key % width))
    assert windows(grid) == list(range(1, 2 * max(grid), 2))


def test_the_window_must_fit_the_grid():
    mass = curve(torch.eye(20), (4, 5))
    assert mass_within(mass, 4, (4, 5)) == mass_within(mass, 3, (4, 5)) == 1
    for window in (0, 6):
        with pytest.raises(ConvFusionError, match="does not fit a grid of 4×5"):
            mass_within(mass, window, (4, 5))


def test_growth_of_uniform_attention_nears_two_on_a_large_grid():
    counts = torch.tensor([1.0, *[8.0 * d for d in range(1, 200)]])  # an unclipped grid
    assert growth_exponent(attention_score_mass(counts), (200, 200)) == pytest.approx(2, abs=0.01)
    assert growth_exponent(curve(torch.eye(64), (8, 8)), (8, 8)) == pytest.approx(0, abs=1e-6)
    assert growth_exponent(curve(torch.eye(16), (4, 4)), (4, 4)) is None


def attention_by_distance(side, weight):
    """Attention with these weights by Chebyshev distance, normalised for each query."""
    grid = (side, side)
    distances = chebyshev(all_queries(grid), grid)
    maps = weight(distances.double().clamp(min=0.7))
    return maps / maps.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("weight", "best", "exponent", "length"),
    [
        (lambda d: d**-1.3, "power", 1.3, None),
        (lambda d: d**-2.0, "quadratic", 2.0, None),
        (lambda d: 0.02 + d**-2.0, "quadratic", 2.0, None),
        (lambda d: 0.02 + d**-3.0, "power", 3.0, None),
        (lambda d: (-d / 4).exp(), "exponential", None, 4.0),
        (lambda d: 1 + (-d / 2).exp(), "exponential", None, 2.0),
        (lambda d: 0 * d + 1, "none", None, None),
        (lambda d: 1 + d, "none", None, None),  # rising is no decay
    ],
)
@pytest.mark.parametrize("side", [16, 32])
def test_decay_laws_are_told_apart_in_whole_maps(side, weight, best, exponent, length):
    maps = attention_by_distance(side, weight)
    fit = statistics_of(maps, (side, side)).decay
    # The rows of border queries are normalised over fewer keys, which bends a law a little.
    assert fit.best == best or (best == "quadratic" and abs(fit.exponent - 2) < 0.1)
    if exponent:
        assert fit.exponent == pytest.approx(exponent, abs=0.15)
        assert fit.r2["power"] > 0.999
    if length:
        assert fit.length == pytest.approx(length, rel=0.1)
        assert fit.r2["exponential"] > 0.999
    if best == "none":
        assert fit.r2["none"] == 0


def test_decay_is_exact_on_an_exact_profile():
    distance = np.arange(1.0, 33)
    fit = fit_decay(torch.tensor([1.0, *(0.01 + 0.5 * distance**-2)]), (32, 32))
    assert fit.best == "quadratic"
    assert fit.terms["quadratic"] == pytest.approx((0.01, 0.5))
    assert fit.value("quadratic", distance) == pytest.approx(0.01 + 0.5 * distance**-2)
    fit = fit_decay(torch.tensor([1.0, *(0.3 * np.exp(-distance / 5))]), (32, 32))
    assert fit.best == "exponential" and fit.length == pytest.approx(5, rel=0.01)
    assert fit.r2["quadratic"] < fit.r2["power"] < fit.r2["exponential"] <= 1


def test_no_decay_is_fitted_to_too_little():
    assert fit_decay(torch.ones(4), (4, 4)) is None
    assert fit_decay(torch.ones(40), (6, 40)) is None  # the shorter side counts
    assert fit_decay(torch.ones(7), (7, 7)).best == "none"


def test_the_filter_halves_its_cut_off_and_drops_the_constant():
    response = HighPass(cutoff=4, order=3).response((16, 16))
    assert response[0, 0] == 0
    assert response[0, 4] == response[4, 0] == pytest.approx(0.5)
    assert response[8, 8] > 0.99 and response[0, 1] < 1e-3
    # On a grid twice as wide, a wave of twice as many cycles has the same length in tokens.
    wide = HighPass(cutoff=4).response((16, 32))
    assert wide[3, 0] == pytest.approx(wide[0, 6].item())
    for bad in ({"cutoff": 0.0}, {"order": 0}):
        with pytest.raises(ConvFusionError, match="cut-off above 0"):
            HighPass(**bad)


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("cutoff", [0.5, 2.0])
def test_high_and_low_part_of_a_wave(order, cutoff):
    grid = (12, 18)
    rows = torch.arange(12, dtype=torch.float64)[:, None].expand(grid)
    wave = (2 * math.pi * 3 * rows / 12).cos().flatten()
    frequency = math.sqrt(12 * 18) * 3 / 12
    expected = wave / (1 + (cutoff / frequency) ** (2 * order))
    found = high_pass(wave + 5, grid, HighPass(cutoff, order).response(grid))
    assert torch.allclose(found, expected)


def test_entropy_and_bias_share_in_numbers():
    maps = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    assert entropy(maps).tolist() == pytest.approx([0.5, 0])
    total = maps.sum(0)
    share = bias_share(total.square().sum(), maps.square().sum(), 2)
    assert share.item() == pytest.approx(0.5 / 0.75)  # ⟨A, B⟩ over the mean of ‖A‖² and ‖B‖²


@settings(deadline=None, max_examples=25)
@given(
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    heads=st.integers(1, 3),
    seed=st.integers(0, 9999),
    spread=st.floats(0.1, 4),
)
def test_streaming_equals_the_whole_map(grid, heads, seed, spread):
    """Every sum of a stream in chunks of one query, against the N×N map written out."""
    tokens = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    query, key = (spread * torch.randn(heads, tokens, 4, generator=generator) for _ in range(2))
    config = Measure(queries=max(8, tokens))
    chunked = Measure(queries=max(8, tokens), memory=1)
    object.__setattr__(chunked, "memory", 1e-4)  # less than a single query: chunks of one
    mean_map = torch.zeros(tokens, tokens)
    stream = measure_attention(query, key, 0.5, grid, chunked, mean_map)
    whole = torch.softmax(0.5 * query.double() @ key.double().transpose(1, 2), dim=-1)
    maps = torch.cat([whole, whole.mean(0, keepdim=True)]).numpy()
    assert np.allclose(mean_map, maps[-1], atol=1e-6)
    for index, found in enumerate(summarise(stream)):
        compare(found, maps[index], grid, config.high_pass)


def compare(found, attention, grid, filters):
    """All statistics of one N×N map by loops over queries and keys, to 1e-5."""
    height, width = grid
    response = np.zeros(grid)
    for u in range(height):
        for v in range(width):
            f = math.sqrt(height * width) * math.hypot(
                min(u, height - u) / height, min(v, width - v) / width
            )
            response[u, v] = 1 / (1 + (filters.cutoff / f) ** (2 * filters.order)) if f else 0
    high = np.fft.ifft2(np.fft.fft2(attention.reshape(-1, *grid)) * response).real
    high = high.reshape(attention.shape)
    rings = np.zeros((3, max(grid)))
    for q in range(len(attention)):
        for k in range(len(attention)):
            d = max(abs(q // width - k // width), abs(q % width - k % width))
            rings[:, d] += attention[q, k], max(high[q, k], 0), abs(high[q, k])
    masses = rings.cumsum(1) / rings.sum(1, keepdims=True)
    assert found.score_mass == pytest.approx(masses[0], abs=1e-5)
    assert found.score_mass_high == pytest.approx(masses[1], abs=1e-5)
    for curve_of, field in (
        (masses[1], found.receptive_field),
        (masses[2], found.receptive_field_magnitude),
    ):
        ring = (field - 1) // 2
        assert curve_of[ring] >= 0.8 - 1e-5
        assert ring == 0 or curve_of[ring - 1] < 0.8 + 1e-5
    assert found.high_share == pytest.approx((high**2).sum() / (attention**2).sum(), abs=1e-5)
    pairs = attention @ attention.T
    mean_pair = (pairs.sum() - pairs.trace()) / (len(pairs) - 1) / pairs.trace()
    assert found.bias_share == pytest.approx(mean_pair, abs=1e-5)
    low = attention - high
    pairs = low @ low.T
    mean_pair = (pairs.sum() - pairs.trace()) / (len(pairs) - 1) / pairs.trace()
    assert found.bias_share_low == pytest.approx(mean_pair, abs=1e-5)
    entropies = -(attention * np.log(attention)).sum(1) / math.log(len(attention))
    assert found.entropy == pytest.approx(entropies.mean(), abs=1e-5)
