"""The small model in Stable Diffusion 3's layout: what is kept draws, and it is made again."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors import safe_open

from convfusion import mini
from convfusion.data import LatentDataset
from convfusion.demo import spread
from convfusion.families import encode_conditioning

pytestmark = pytest.mark.libraries

MINI = Path(__file__).parent.parent / "recipes" / "mini"
CAPTIONS = ["dog face, noto", ""]


@pytest.fixture
def joint(monkeypatch):
    monkeypatch.syspath_prepend(MINI)
    return importlib.import_module("joint")


@pytest.fixture
def teacher(joint, monkeypatch):
    """The recipe for a model of two blocks, width 16 and grids of 32×32 tokens at most."""
    module = importlib.import_module("joint_teacher")
    small = {"WIDTH": 16, "HEADS": 2, "BLOCKS": 2, "LARGEST": 32, "JUDGED": 8, "STEPS": 2}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "shown_prompts", lambda: CAPTIONS)
    return module


@pytest.fixture
def train(teacher, monkeypatch, tmp_path):
    """The recipe on four pictures; each step takes a minute by the clock that it looks at."""
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "emoji.npz", images=images)
    rows = [{"name": name, "tone": "", "design": "noto"} for name in "abcde"]
    (tmp_path / "names.json").write_text(json.dumps({"held_out": ["e"], "pictures": rows}))
    now, step = [0.0], teacher.take_step

    def take_step(*args):
        now[0] += 60
        return step(*args)

    monkeypatch.setattr(teacher.time, "process_time", lambda: now[0])
    monkeypatch.setattr(teacher, "take_step", take_step)

    def run(folder, minutes):
        folder.mkdir(exist_ok=True)
        for name in ("emoji.npz", "names.json"):
            (folder / name).write_bytes((tmp_path / name).read_bytes())
        given = ("--run", str(folder), "train", "--minutes", str(minutes), "--batch", "2")
        monkeypatch.setattr(sys, "argv", ["x", *given])
        teacher.main()
        return folder

    return run


def test_the_first_encoder_is_the_embedded_one_and_its_projection_changes_nothing(joint):
    own = mini.load_teacher()
    ids = own.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    projected = joint.with_projection(own.text_encoder)
    with torch.no_grad():
        found, expected = projected(ids), own.text_encoder(ids)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.text_embeds, expected.pooler_output)


def test_one_counted_zero_is_attended_to_as_the_zeros_of_the_pipeline(teacher, monkeypatch):
    embedded = teacher.embedded_parts()
    parts = teacher.make_parts(embedded["text_encoder"]).eval()
    for parameter in parts["transformer"].parameters():
        if not parameter.any():  # what starts at zero would hide the attention
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = teacher.to_pipeline(parts, embedded)
    told = encode_conditioning(pipe, CAPTIONS, (64, 64))
    assert told["encoder_hidden_states"].shape == (2, 24 + 256, 192 + 32)
    encoders = [embedded["text_encoder"], parts["text_2"]]
    latents, times = torch.randn(2, 4, 6, 5), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        text = teacher.embed(encoders, embedded["tokenizer"], CAPTIONS)
        assert text[0].shape == (2, 24 + 1, 192 + 32)
        found = parts["transformer"](latents, *text, times, return_dict=False)[0]
        expected = pipe.transformer(latents, timestep=times, return_dict=False, **told)[0]
        monkeypatch.setattr(teacher, "T5_TOKENS", 200)
        wrong = parts["transformer"](latents, *text, times, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (wrong - expected).abs().max() > 1e-4


def test_shares_of_noise_are_logit_normal(joint):
    drawn = joint.noise_shares((torch.arange(1000) + 0.5) / 1000)
    logits = drawn.logit()
    assert logits.mean() == pytest.approx(0, abs=1e-4)
    assert logits.std() == pytest.approx(1, abs=0.01)


def test_the_recipe_spends_its_budget_and_goes_on_as_if_it_had_not_stopped(
    train, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher, "draw", lambda pipe, path: path.touch())  # which takes its time
    whole = train(tmp_path / "whole", minutes=3)
    train(tmp_path / "parts", minutes=2)
    parts = train(tmp_path / "parts", minutes=3)
    one, other = (
        torch.load(run / "joint" / "teacher.pt", weights_only=True) for run in (whole, parts)
    )
    assert one["step"] == other["step"] == 3
    assert one["budget"] == {"seconds": 180}
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][key]), key
    assert (whole / "joint" / "teacher-000003.png").exists()


def test_what_is_packaged_draws_as_what_was_trained(train, joint, teacher, tmp_path, monkeypatch):
    run, kept = train(tmp_path / "run", minutes=2), tmp_path / "kept"
    monkeypatch.setattr(teacher, "KEPT", kept)
    teacher.package(run)
    assert {path.name for path in kept.iterdir() if path.is_dir()} == {
        "transformer", "text_encoder_2", "scheduler",
    }  # fmt: skip
    for file in kept.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    facts = json.loads((kept / "joint.json").read_text())
    assert (facts["steps"], facts["seconds"]) == (2, 120)
    assert 0.9 < facts["choice"]["relative"] < 1.1  # it says next to nothing yet
    assert (kept / "drawn.png").read_bytes()
    pipes = (
        joint.load_joint(kept),
        DiffusionPipeline.from_pretrained(run / "joint" / "teacher", **joint.NO_T5),
    )
    for pipe in pipes:
        assert isinstance(pipe, StableDiffusion3Pipeline)
        assert isinstance(
            pipe.transformer.transformer_blocks[0].attn.processor, JointAttnProcessor2_0
        )
    drawn, trained = (draw(pipe, CAPTIONS[:1]) for pipe in pipes)
    torch.testing.assert_close(drawn, trained, atol=0.02, rtol=0)


def draw(pipe, captions, **options):
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(number) for number in range(len(captions))]
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0} | options
    return torch.from_numpy(pipe(captions, generator=seeds, output_type="np", **options).images)


def test_what_is_kept_is_small_and_foretells_held_out_pictures(joint):
    files = [file for file in joint.KEPT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 9e6
    for file in joint.KEPT.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            assert {tensors.get_slice(name).get_dtype() for name in names} == {"F16"}
    pipe, data = joint.load_joint(), spread(mini.held_out_data("choice"), 4)
    found = joint.measure(pipe, data)
    assert found["relative"] == pytest.approx(joint.read_facts()["choice"]["relative"], rel=0.4)
    assert found["relative"] < 0.6 * linear_guess(joint, data)
    silent = joint.measure(pipe, LatentDataset(data.latents, [""] * len(data)))
    assert found["loss"] < silent["loss"]  # its captions help


def linear_guess(joint, data):
    """‖v̂ − v‖²/‖v‖² of v̂ = E[v | x_σ] for latents that were independent normal numbers."""
    share = joint.noise_shares((torch.arange(100) + 0.5) / 100)
    variance, mean = data.latents.var(), data.latents.mean()
    noisy = (1 - share) ** 2 * variance + share**2
    left = (1 + variance) - (share - (1 - share) * variance) ** 2 / noisy
    return float(left.mean() / (1 + variance + mean**2))


def test_what_is_kept_loads_and_draws_as_any_pipeline(joint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "build", str(tmp_path / "built")])
    joint.main()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "built", **joint.NO_T5)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert pipe.text_encoder_3 is None
    one, two = draw(pipe, ["dog face, noto"] * 2)
    assert one.shape == (64, 64, 3)
    assert not torch.equal(one, two)  # a seed each
    assert not torch.equal(one, draw(pipe, ["dog face, noto"], guidance_scale=1.0)[0])
    larger = draw(pipe, ["dog face, noto"], height=96, width=80, num_inference_steps=1)
    assert larger.shape == (1, 96, 80, 3)
    positions = pipe.transformer.pos_embed.cropped_pos_embed(64, 64)[0]  # of the largest grid
    assert len(positions.unique(dim=0)) == 64 * 64
