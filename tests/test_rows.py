"""Tables of times, and what follows from them; the times here are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convfusion.bench.latency import Measured, Variant
from convfusion.bench.plots import latency
from convfusion.bench.rows import (
    find_crossovers,
    find_meeting,
    fit_growth,
    make_rows,
    read_rows,
    renew_rows,
    write_rows,
)
from convfusion.bench.runs import Limits, with_compiled
from convfusion.bench.timing import Timing, describe_machine
from convfusion.errors import ConvFusionError
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.surgery.config import uniform

CASE = {
    "model": "sd15",
    "site": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "count": 2,
    "channels": 320,
    "kernel_size": 7,
    "width": 512,
    "height": 512,
    "tokens": 4096,
    "batch": 2,
    "dtype": "float32",
    "backward": False,
}


def rows(tokens=4096, **seconds):
    found = {
        name: Measured(Timing((s, 2 * s, 4 * s), 2**20), 1e-7)
        if s
        else Measured(None, None, "left out")
        for name, s in seconds.items()
    }
    side = round(512 * (tokens / 4096) ** 0.5)
    case = CASE | {"tokens": tokens, "width": side, "height": side}
    return make_rows(found, case, describe_machine(torch.device("cpu")))


def test_rows_tell_median_spread_and_what_was_left_out():
    timed, out = rows(attention=0.5, linfusion=0)
    assert (timed.fastest_ms, timed.median_ms, timed.slowest_ms) == (500, 1000, 2000)
    assert timed.spread == 1.5 and out.spread is None
    assert (timed.peak_mib, timed.rounds, timed.parity) == (1, 3, 1e-7)
    assert out.median_ms is None and out.note == "left out" and out.rounds == 0


def test_a_table_comes_back_from_disk(tmp_path):
    kept = rows(attention=0.5, linfusion=0) + [
        replace(row, site="", channels=None, kernel_size=None, backward=True)
        for row in rows(attention=0.25)
    ]
    write_rows(tmp_path / "times.csv", kept)
    assert read_rows(tmp_path / "times.csv") == kept


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", "{}"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(ConvFusionError, match="no table of latencies"):
        read_rows(tmp_path / "times.csv")


def test_a_damaged_number_is_refused(tmp_path):
    write_rows(tmp_path / "times.csv", rows(attention=0.5))
    text = (tmp_path / "times.csv").read_text().replace("4096", "many")
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(ConvFusionError, match="damaged"):
        read_rows(tmp_path / "times.csv")


def test_a_case_that_is_measured_again_replaces_all_its_rows():
    old = rows(attention=1, linfusion=1) + rows(1024, attention=1)
    new = rows(attention=2)
    assert renew_rows(old, new) == old[2:] + new


def test_the_crossover_lies_where_the_lines_meet():
    table = [r for n in (1024, 4096, 16384) for r in rows(n, attention=n * n, block=n * 3000)]
    (found,) = find_crossovers(table)
    assert found.tokens == pytest.approx(3000, rel=1e-2) and not found.always
    assert found.speedup[4096] == pytest.approx(4096 / 3000, rel=1e-3)


def test_no_crossover_without_the_attention_or_a_time():
    assert find_crossovers(rows(block=1)) == []
    assert find_crossovers(rows(attention=1, block=0)) == []


@given(st.dictionaries(st.integers(1, 10**6), st.floats(0.01, 100), min_size=1))
def test_a_meeting_point_is_faster_for_good(speedup):
    tokens, always = find_meeting(speedup)
    sizes = sorted(speedup)
    if tokens is None:
        assert speedup[sizes[-1]] <= 1 and not always
        return
    assert all(speedup[n] > 1 for n in sizes if n > tokens * (1 + 1e-9))
    assert always == all(value > 1 for value in speedup.values())
    assert sizes[0] <= tokens * (1 + 1e-9) and tokens <= sizes[-1] * (1 + 1e-9)


@given(st.floats(-3, 3), st.floats(0.01, 100))
def test_growth_is_the_exponent(exponent, factor):
    values = {n: factor * n**exponent for n in (16, 64, 256)}
    assert fit_growth(values) == pytest.approx(exponent, abs=1e-9)


def test_what_would_take_too_long_is_left_out():
    limits = Limits(10)
    variants = {"attention": Variant(), "block": Variant(uniform(DeltaConv()))}
    assert limits.split(variants, 64) == (variants, {})
    found = {name: Measured(Timing((1.0,), None)) for name in variants}
    limits.learn(found, 64)
    assert limits.expected("attention", 128) == 4  # of one size, the square
    limits.learn({"block": Measured(Timing((2.0,), None))}, 128)
    assert limits.expected("block", 256) == pytest.approx(4)  # of two, their own exponent
    kept, notes = limits.split(variants, 256)
    assert list(kept) == ["block"] and "about 16 s" in notes["attention"].note


def test_only_blocks_are_compiled():
    variants = {"attention": Variant(), "delta_conv 0.5": Variant(uniform(DeltaConv()))}
    found = with_compiled(variants)
    assert list(found) == ["attention", "delta_conv 0.5", "delta_conv 0.5 compiled"]
    assert [each.compiled for each in found.values()] == [False, False, True]


def test_the_figure_has_a_panel_for_each_series(tmp_path):
    table = rows(1024, attention=1, block=2) + rows(4096, attention=16, block=8)
    table += [replace(row, site="", batch=1) for row in rows(attention=1, block=0)]
    figure = latency(table)
    assert len(figure.axes) == 2
    names = [line.get_label() for line in figure.axes[0].get_lines()]
    assert names == ["attention", "block"]
    assert len(figure.axes[1].get_lines()) == 1
    with pytest.raises(ConvFusionError, match="nothing was timed"):
        latency(rows(attention=0))
