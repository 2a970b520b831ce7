"""The demo: what it writes, and sentences that hold for whatever it finds."""

import itertools
import json
import re

import numpy as np
import pytest

from convfusion import Removed, convert, demo, mini, start_from_attention, uniform
from convfusion.cli.console import print_results
from convfusion.demo import ALIKE, ROWS, give_verdict, list_results, run_demo, tell_shares
from convfusion.distill import DistillConfig
from convfusion.distill.startup import draw_noised_batches
from convfusion.operations import operations_ratio

JUDGED = [name for name in ROWS if name not in ("teacher", "removed")]


def found(**shares):
    """Results in which each model leaves a share of the error without self-attention."""
    results = {
        name: {
            "epsilon_error": 0.5 * shares.get(name, 0.02),
            "image_psnr": 20.0,
            "image_psnr_error": 1.0,
            "flops_ratio": 3.0,
        }
        for name in JUDGED
    }
    results["removed"] = {"epsilon_error": 0.5, "image_psnr": 10.0, "image_psnr_error": 0.5}
    results["distilled"]["steps"] = 7
    return results


def test_the_demo_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EVALUATED", 4)
    monkeypatch.setattr(demo, "DRAWN", 3)
    monkeypatch.setattr(demo, "SHOWN", 2)
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(demo, "IMAGE_STEPS", 2)
    said, drawn, asked, held_out_data = [], [], [], mini.held_out_data
    monkeypatch.setattr(
        mini, "held_out_data", lambda part: (asked.append(part), held_out_data(part))[1]
    )
    config = DistillConfig(steps=2, batch_size=2, learning_rate=1e-4)
    results = run_demo(tmp_path, config, say=said.append, on_drawn=drawn.append)
    assert results == json.loads((tmp_path / "demo.json").read_text())
    for name in ("removed", *JUDGED):
        assert results[name]["epsilon_error"] > 0
        assert np.isfinite(results[name]["image_psnr"])
        assert results[name]["image_psnr_error"] > 0
    for name in JUDGED:
        assert results[name]["flops_ratio"] > 1
        assert results[name]["parameters"] < results["parameters"]
    assert results["distilled"].keys() >= {"steps", "seconds"}
    assert results["converted"]["seconds"] > 0
    assert set(asked) == {results["held_out"]} == {"results"}  # nothing was chosen on these
    assert (results["sites"], results["latents"], results["pictures"]) == (7, 4, 3)
    assert (tmp_path / "grid.png").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    assert "<img" in page and 'src="data:image/png;base64,' in page
    assert page.index("<h1>") < page.index("Row 2 is the teacher of row 1") < page.index("<img")
    assert "http://" not in page and "https://" not in page
    assert len(said) == 5
    assert sum(drawn) == len(ROWS) * 3
    monkeypatch.setenv("COLUMNS", "80")
    print_results(results)
    shown = capsys.readouterr().out
    for line in list_results(results):
        assert all(cell in shown and cell in page for cell in line)


def test_untrained_blocks_are_as_near_and_as_cheap_as_the_demo_promises():
    """On pictures of `choice`: at most 1/30 of what no self-attention leaves, at 3× fewer."""
    held_out = demo.spread(mini.held_out_data("choice"), 8)
    removed, converted = mini.load_teacher(), mini.load_teacher()
    convert(removed, uniform(Removed()))
    convert(converted, demo.load_near_blocks())
    start_from_attention(converted, draw_noised_batches(converted, mini.training_data()))
    error = demo.measure_error(converted, held_out)
    assert error < demo.measure_error(removed, held_out) / 30
    assert operations_ratio(converted, demo.LATENTS) >= 3


@pytest.mark.parametrize("far", itertools.product([False, True], repeat=len(JUDGED)))
def test_the_verdict_names_the_rows_that_look_alike_and_those_that_do_not(far):
    shares = {name: 1.3 if away else ALIKE / 2 for name, away in zip(JUDGED, far, strict=True)}
    verdict = give_verdict(found(**shares))
    near = re.search(r"Rows? ([\d, and]+) should look like row 1\.", verdict)
    away = re.search(r"too far from row 1 to look like it: rows? ([\d, and]+)\.", verdict)
    rows = [
        [int(row) for row in re.findall(r"\d", part[1])] if part else [] for part in (near, away)
    ]
    assert rows == [[3 + i for i in range(len(far)) if far[i] is kind] for kind in (False, True)]
    assert verdict.endswith(tell_shares(found(**shares)))


def test_shares_are_told_in_the_order_of_their_names():
    told = tell_shares(found(converted=0.021, distilled=1.25, delta_conv=0.034, near=0.012))
    assert re.findall(r"[\d.]+%", told) == ["2.1%", "125.0%", "3.4%", "1.2%"]
    assert "after 7 steps" in told
