"""Blocks in one file: its header has the manifest, so that it can be passed on alone."""

import json
import shutil

import pytest
import torch
from tiny_models import CASES, randomise, sd15

import convfusion
from convfusion import CheckpointError, Halo, uniform
from convfusion.checkpoint import BLOCKS, MANIFEST
from convfusion.checkpoint.manifests import NOTE
from convfusion.files import read_notes, read_tensors, write_tensors
from convfusion.surgery import mixers_of


@pytest.fixture
def model():
    converted = sd15()
    convfusion.convert(converted, uniform(Halo()))
    randomise(mixers_of(converted))
    return converted


def assert_same_blocks(left, right):
    left, right = mixers_of(left), mixers_of(right)
    assert left.keys() == right.keys()
    for path, mixer in left.items():
        assert mixer.config == right[path].config
        for name, tensor in mixer.state_dict().items():
            assert torch.equal(tensor, right[path].state_dict()[name])


def test_one_file_is_written_and_read(model, tmp_path):
    path = tmp_path / "nearer.safetensors"
    convfusion.save(model, path)
    assert [each.name for each in tmp_path.iterdir()] == ["nearer.safetensors"]
    other = sd15()
    status = convfusion.load(other, path)
    assert_same_blocks(model, other)
    assert str(status.record) == "not trained"


def test_the_file_of_a_folder_can_be_passed_on_alone(model, tmp_path):
    convfusion.save(model, tmp_path / "folder")
    alone = shutil.copy(tmp_path / "folder" / BLOCKS, tmp_path / "shared.safetensors")
    other = sd15()
    convfusion.load(other, alone)
    assert_same_blocks(model, other)


def test_the_file_inside_a_folder_is_its_folder(model, tmp_path):
    """With the digest of the manifest beside it, and without a note in its header."""
    convfusion.save(model, tmp_path)
    path = tmp_path / BLOCKS
    digest = write_tensors(path, read_tensors(path))
    with pytest.raises(CheckpointError, match="is not the file that"):
        convfusion.load(sd15(), path)
    manifest = {**json.loads((tmp_path / MANIFEST).read_text()), "sha256": digest}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    other = sd15()
    convfusion.load(other, path)
    assert_same_blocks(model, other)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not a manifest of format 1"),
        ('{"format": 1, "sites": 3}', "`sites` must map"),
        (None, "neither blocks in the names of the released files nor a manifest"),
    ],
)
def test_a_damaged_note_is_named(model, note, message, tmp_path):
    path = tmp_path / "a.safetensors"
    convfusion.save(model, path)
    write_tensors(path, read_tensors(path), {} if note is None else {NOTE: note})
    other = sd15()
    with pytest.raises(CheckpointError, match=message):
        convfusion.load(other, path)
    assert convfusion.status(other).converted == 0


def test_a_file_for_another_model_is_refused(model, tmp_path):
    convfusion.save(model, tmp_path / "a.safetensors")
    dit = next(case for case in CASES if case.name == "dit").model()
    with pytest.raises(CheckpointError, match="for a unet model, and this is a dit"):
        convfusion.load(dit, tmp_path / "a.safetensors")


def test_the_note_is_the_manifest_without_the_digest(model, tmp_path):
    convfusion.save(model, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    note = json.loads(read_notes(tmp_path / BLOCKS)[NOTE])
    assert note == {k: v for k, v in manifest.items() if k != "sha256"}
