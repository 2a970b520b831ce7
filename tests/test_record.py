"""Blocks say whether they are trained, from which start and for how many steps."""

import copy
import json
from typing import get_args

import pytest
import torch
from tiny_pipelines import block_weights, stable_diffusion

import convfusion
from convfusion import CheckpointError, DeltaConv, Removed, mini, uniform
from convfusion.data import LatentDataset
from convfusion.distill import DistillConfig, distill, start_from_attention
from convfusion.distill.estimate import estimate_run
from convfusion.surgery.record import TrainingRecord

pytestmark = pytest.mark.libraries
TRAINING = DistillConfig(steps=2, batch_size=2, tracker="none")


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    return pipe


@pytest.fixture
def data():
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentDataset(latents, ["red apple", "green apple", "red", ""])


def test_the_record_goes_with_the_blocks(pipe, data, tmp_path):
    """Through a conversion, a start, training, a copy, a folder and a whole pipeline."""
    assert convfusion.status(pipe).record == TrainingRecord("converted")
    assert "blocks not trained" in str(convfusion.status(pipe))
    start_from_attention(pipe, data)
    started = convfusion.status(pipe).record
    assert started == TrainingRecord("attention") and not started.is_trained
    convfusion.save(pipe, tmp_path / "started")
    manifest = json.loads((tmp_path / "started" / "convfusion.json").read_text())
    assert (manifest["trained"], manifest["started_from"]) == (False, "attention")
    distill(pipe, data, TRAINING)
    trained = TrainingRecord("attention", 2)
    assert convfusion.status(pipe).record == trained and trained.is_trained
    assert "blocks trained for 2 steps" in str(convfusion.status(pipe))
    assert convfusion.status(copy.deepcopy(pipe.unet)).record == trained
    convfusion.save(pipe, tmp_path / "blocks")
    manifest = json.loads((tmp_path / "blocks" / "convfusion.json").read_text())
    assert manifest["trained"] == {"steps": 2}
    base = stable_diffusion()
    assert convfusion.load(base, tmp_path / "blocks").record == trained
    convfusion.save_pipeline(pipe, tmp_path / "pipe")
    assert convfusion.status(convfusion.load_pipeline(tmp_path / "pipe")).record == trained
    assert convfusion.load(pipe, tmp_path / "started").record == started  # over trained ones


def test_training_that_goes_on_keeps_what_was_learnt(pipe, data, tmp_path):
    """The default start is for blocks that never had one; the steps add up, resumed or not."""
    distill(pipe, data, TRAINING, tmp_path / "first")
    learnt = block_weights(pipe)
    torch.manual_seed(0)
    again = stable_diffusion()
    convfusion.load(again, tmp_path / "first")
    before = {}

    def note(step, terms):
        before.setdefault(step, convfusion.status(again).record)

    gentle = DistillConfig(steps=2, batch_size=2, tracker="none", learning_rate=1e-9, save_every=1)
    distill(again, data, gentle, tmp_path / "second", on_step=note)
    assert before == {1: TrainingRecord("attention", 3), 2: TrainingRecord("attention", 4)}
    for name, tensor in block_weights(again).items():
        torch.testing.assert_close(tensor, learnt[name], rtol=1e-5, atol=1e-7)
    longer = DistillConfig(steps=3, batch_size=2, tracker="none", learning_rate=1e-9, save_every=1)
    distill(again, data, longer, tmp_path / "second", resume=True)
    assert convfusion.status(again).record == TrainingRecord("attention", 5)


def test_a_dry_run_trains_nothing(pipe):
    estimate_run(pipe, TRAINING)
    assert convfusion.status(pipe).record == TrainingRecord("converted")


def test_mixers_that_cannot_learn_have_no_record(pipe):
    convfusion.revert(pipe)
    assert convfusion.convert(pipe, uniform(Removed())).record is None


@pytest.mark.parametrize("name", get_args(mini.Student))
def test_the_packaged_students_are_trained(name):
    record = convfusion.status(mini.load_student(name)).record
    assert record.is_trained and record.origin == "attention"


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        ({}, TrainingRecord("unknown")),
        ({"trained": True}, None),
        ({"trained": {"steps": -1}}, None),
        ({"trained": {}}, None),
        ({"trained": False, "started_from": "nowhere"}, None),
        ({"trained": False, "started_from": "released"}, None),
        ({"trained": {"steps": 0}, "started_from": "attention"}, None),
        ({"trained": {"steps": 0}, "started_from": "released"}, TrainingRecord("released")),
    ],
)
def test_a_manifest_says_it_or_is_of_an_earlier_version(pipe, tmp_path, entry, record):
    convfusion.save(pipe, tmp_path)
    file = tmp_path / "convfusion.json"
    manifest = json.loads(file.read_text())
    del manifest["trained"], manifest["started_from"]
    file.write_text(json.dumps(manifest | entry))
    if record is None:
        with pytest.raises(CheckpointError, match="whether the blocks are trained"):
            convfusion.load(stable_diffusion(), tmp_path)
    else:
        loaded = convfusion.load(stable_diffusion(), tmp_path).record
        assert loaded == record and loaded.is_trained
