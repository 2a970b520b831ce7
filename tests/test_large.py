"""The embedded model's sibling at 128 pixels, which the recipes keep."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convfusion import ConvFusionError, mini
from convfusion.families.watch import watch_attention

pytestmark = pytest.mark.libraries

MINI = Path(__file__).parent.parent / "recipes" / "mini"


@pytest.fixture
def large(monkeypatch):
    monkeypatch.syspath_prepend(MINI)
    return importlib.import_module("large")


def test_it_is_the_teacher_with_the_kept_transformer_blocks(large):
    kept = load_file(MINI / "large" / "blocks.safetensors")
    base, found = mini.load_teacher().unet.state_dict(), large.load_large().unet.state_dict()
    assert set(kept) == {name for name in base if ".transformer_blocks." in name}
    for name, tensor in found.items():
        assert torch.equal(tensor, kept[name].float() if name in kept else base[name])
    moved = [name for name in kept if not torch.equal(found[name], base[name])]
    assert len(moved) > 0.9 * len(kept)


def test_another_base_is_refused_in_one_line(large, monkeypatch):
    monkeypatch.setattr(mini, "teacher_hash", lambda: "0" * 64)
    base = large.read_facts()["base"]
    with pytest.raises(ConvFusionError) as refused:
        large.load_large()
    said = str(refused.value)
    assert said.endswith(f"its base is {base[:12]}, here is 000000000000")
    assert "\n" not in said


def test_its_finest_self_attention_has_32x32_tokens(large):
    pipe = large.load_large()
    grids = {}
    pipe.set_progress_bar_config(disable=True)

    def see(site, attention, given):
        assert given.tokens.shape[1] == given.grid[0] * given.grid[1]
        grids[site.path] = given.grid

    with watch_attention(pipe.unet, see):
        latents = pipe("x", num_inference_steps=1, output_type="latent").images

    assert latents.shape == (1, 4, 32, 32)
    assert sorted(set(grids.values())) == [(8, 8), (16, 16), (32, 32)]


def test_its_held_out_latents_are_of_the_lists_of_the_embedded_model(large):
    training = large.training_data()
    assert training.latents.shape == (192, 4, 32, 32)
    assert set(training.captions) <= set(mini.training_data().captions)
    seen = {latents.numpy().tobytes() for latents in training.latents}
    for part in ("choice", "results"):
        held = large.held_out_data(part)
        assert held.latents.shape == (64, 4, 32, 32)
        assert len(set(held.captions)) == 64
        assert set(held.captions) <= set(mini.held_out_data(part).captions)
        assert not seen & {latents.numpy().tobytes() for latents in held.latents}
        assert 0.8 < held.latents.std() < 1.2


def test_larger_pictures_may_be_fewer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(MINI)
    load_pictures = importlib.import_module("common").load_pictures
    rows = [{"name": name, "tone": "", "design": "noto"} for name in "abc"]
    (tmp_path / "names.json").write_text(json.dumps({"held_out": ["c"], "pictures": rows}))
    images = np.stack([np.full((128, 128, 3), value, np.uint8) for value in (1, 2)])
    np.savez(tmp_path / "emoji-128.npz", images=images, rows=np.array([0, 2]))
    for side, name, value in (("train", "a", 1), ("held_out", "c", 2)):
        pictures = load_pictures(tmp_path, side, size=128)
        assert [row["name"] for row in pictures.rows] == [name]
        assert pictures.images.unique().tolist() == [value]


def test_only_graphics_that_stand_as_they_are_are_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(MINI)
    read_graphics = importlib.import_module("emoji_large").read_graphics
    icons = {"width": 36, "height": 36, "icons": {"cat": {"body": "<g/>", "height": 20}}}
    icons["aliases"] = {"tom": {"parent": "cat"}, "tac": {"parent": "cat", "hFlip": True}}
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    chars = {"1f408": "cat", "1f431-fe0f": "tom", "1f640": "tac", "1f63f": "dog"}
    (tmp_path / "chars.json").write_text(json.dumps(chars))
    found = read_graphics(tmp_path)
    assert set(found) == {"1f408", "1f431"}
    assert 'width="128" height="128" viewBox="0 0 36 20"><g/></svg>' in found["1f431"]
