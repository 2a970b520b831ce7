"""The command line on a model whose text and image share an attention."""

import pytest
from tiny_pipelines import flux_dev

import convfusion
from convfusion import DeltaConv, Halo, uniform
from convfusion.surgery.record import TrainingRecord


@pytest.fixture
def folder(tmp_path):
    flux_dev().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_halo_blocks_that_share_a_text_start_near_their_attention_without_a_measure():
    pipe = flux_dev()
    assert convfusion.convert(pipe).record == TrainingRecord("attention")
    convfusion.revert(pipe)
    assert convfusion.convert(pipe, uniform(DeltaConv(3))).record == TrainingRecord("converted")
    some = {"transformer_blocks.*": Halo(8, 16, 8, 1, 1), "*": DeltaConv(3)}
    convfusion.revert(pipe)
    mixed = convfusion.convert(pipe, convfusion.ConvertConfig(some))
    assert mixed.record == TrainingRecord("converted")  # the least of its blocks


def test_converting_says_what_to_expect_and_that_nothing_was_measured(run, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n", encoding="utf-8")
    options = ("--measure", prompts, "--size", "32x32", "--out", tmp_path / "out")
    code, out, err = run("convert", folder, *options)
    assert code == 0, err
    assert "There was nothing to measure" in out and "expected error" not in out
    assert "halo blocks draw nearly as before" in out and "poor, or noise" not in out
    assert "halo blocks draw nearly as before" in run("info", tmp_path / "out")[1]
