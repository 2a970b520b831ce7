"""Losses and gradients that are not finite: skipped, counted, and named when they stay."""

from dataclasses import replace

import pytest
import torch
from test_resume import converted, samples
from tiny_pipelines import block_weights

from convfusion import ConvFusionError
from convfusion.distill import DistillConfig, distill
from convfusion.distill.state import last_checkpoint
from convfusion.distill.task import DistillTask
from convfusion.surgery import mixers_of

CONFIG = DistillConfig(
    steps=4, start="converted", batch_size=2, warmup=1, save_every=1, max_skipped=2, ema=0.5
)


def spoil(monkeypatch, calls, value):
    """Let the loss of these calls, counted from 1, be a value that is not finite."""
    measure, count = DistillTask.losses, 0

    def spoilt(self, *args):
        nonlocal count
        count += 1
        found = measure(self, *args)
        if count in calls:
            found.terms["distill"] = found.terms["distill"] * value
        return found

    monkeypatch.setattr(DistillTask, "losses", spoilt)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_counted(monkeypatch, value):
    pipe, seen = converted(), []
    spoil(monkeypatch, {2}, value)
    result = distill(
        pipe, samples(), CONFIG, on_step=lambda step, terms: seen.append(block_weights(pipe))
    )
    assert result.steps == 4 and result.skipped == 1
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in seen[1].items())
    assert all(not torch.equal(seen[1][name], tensor) for name, tensor in seen[2].items())
    assert all(tensor.isfinite().all() for tensor in block_weights(pipe).values())


def test_many_in_a_row_stop_the_run_and_name_the_site(tmp_path):
    pipe = converted()
    paths = list(mixers_of(pipe))
    config = replace(CONFIG, steps=9, save_every=3)

    def spoil_block(step, terms):
        if step == 4:
            mixers_of(pipe)[paths[1]].proj_out.weight.data.fill_(float("nan"))

    with pytest.raises(ConvFusionError) as caught:
        distill(pipe, samples(), config, tmp_path, on_step=spoil_block)
    said = str(caught.value)
    assert "2 steps in a row, up to step 6" in said
    assert f"the output of the block at {paths[1]}." in said
    assert str(last_checkpoint(tmp_path)) in said


def test_a_spoilt_block_is_never_saved(tmp_path):
    pipe = converted()

    def spoil_block(step, terms):
        if step == 2:
            next(iter(mixers_of(pipe).values())).proj_in.weight.data.fill_(float("inf"))

    with pytest.raises(ConvFusionError, match=r"after step 2 .*proj_in\.weight is not"):
        distill(pipe, samples(), CONFIG, tmp_path, on_step=spoil_block)
    assert last_checkpoint(tmp_path).name == "step-0000001"
    again = converted()
    result = distill(again, samples(), CONFIG, tmp_path, resume=True)
    assert result.steps == 4
    assert all(tensor.isfinite().all() for tensor in block_weights(again).values())


@pytest.mark.parametrize("place", ["down_blocks.1", "mid_block", "up_blocks.0"])
def test_a_gradient_that_is_not_finite_names_its_site(place):
    """Of the sites that it spoils, those before it on the way get theirs from it."""
    pipe = converted()
    path = next(path for path in mixers_of(pipe) if path.startswith(place))
    mixers_of(pipe)[path].proj_out.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(ConvFusionError, match="gradient of the block at " + path):
        distill(pipe, samples(), CONFIG)


@pytest.mark.parametrize("place", ["down_blocks.1", "mid_block", "up_blocks.0"])
def test_an_output_that_is_not_finite_names_its_site(place):
    pipe = converted()
    path = next(path for path in mixers_of(pipe) if path.startswith(place))
    mixers_of(pipe)[path].proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(ConvFusionError, match="output of the block at " + path):
        distill(pipe, samples(), replace(CONFIG, save_every=10))


def test_a_frozen_model_that_is_not_finite_is_not_a_blocks_fault():
    pipe = converted()
    pipe.unet.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(ConvFusionError, match="the data, or the frozen model"):
        distill(pipe, samples(), CONFIG)
    with pytest.raises(ConvFusionError, match=r"mean attention .* the data, or the frozen model"):
        distill(pipe, samples(), replace(CONFIG, start="attention"))
