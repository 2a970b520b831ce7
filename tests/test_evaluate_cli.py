"""`convfusion evaluate`: what it writes, and how it answers a mistake."""

import json
import sys

import pytest
import torch
from evaluations import make_settings, student, thumbnails
from PIL import Image
from tiny_pipelines import stable_diffusion
from transformers import Dinov2Config, Dinov2Model

import convfusion
from convfusion import evaluate as api
from convfusion import mini
from convfusion.cli.evaluate import (
    choose_prompts,
    open_real_pictures,
    print_evaluation,
)
from convfusion.cli.models import name_pipeline
from convfusion.evaluate import drawing, plan_evaluation
from convfusion.evaluate.real import open_real
from convfusion.files import write_tensors

pytestmark = pytest.mark.libraries


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, blocks for it, prompts, real pictures, a small extractor and what is no good."""
    root = tmp_path_factory.mktemp("places")
    pipe = stable_diffusion()
    pipe.save_pretrained(root / "model")
    convfusion.convert(pipe)
    convfusion.save(pipe, root / "blocks")
    (root / "prompts.txt").write_text("red apple\n\ngreen apple\n")
    (root / "none.txt").write_text("\n")
    (root / "real").mkdir()
    (root / "empty").mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (20, 20), name).save(root / "real" / f"{name}.png")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(root / "dino")
    other = stable_diffusion()
    torch.nn.init.zeros_(other.vae.quant_conv.weight)
    other.save_pretrained(root / "other-vae")
    write_tensors(root / "network.safetensors", {"x": torch.zeros(1)})
    (root / "full").mkdir()
    (root / "full" / "thesis.tex").write_text("x")
    return root


def test_evaluate(run, places, tmp_path):
    out = tmp_path / "out"
    options = ("--blocks", places / "blocks", "--prompts", places / "prompts.txt", "--steps", 2)
    options += ("--extractor", places / "dino", "--real", places / "real", "--samples", 4)
    code, said, err = run("evaluate", places / "model", "--out", out, *options)
    assert code == 0, err
    told = json.loads((out / "evaluation.json").read_text())
    assert told["student"] == "model with the blocks of blocks"
    assert told["extractor"]["name"] == "dino" and told["real"]["name"] == "real"
    assert [each["prompt"] for each in told["samples"]] == ["red apple", "green apple"] * 2
    assert told["settings"] | {"samples": 4, "steps": 2, "guidance": 5.0} == told["settings"]
    assert "frechet distance" in said and str(out) in said
    assert str(places) not in (out / "evaluation.json").read_text()
    assert len(list(out.glob("*/*.png"))) == 12
    code, _, err = run("evaluate", places / "model", "--out", out, *options, "--seed", 9)
    assert code == 2 and "begun with other settings (seeds)" in err


def test_the_embedded_model_brings_prompts_and_pictures_of_its_own():
    """Those that neither teacher nor student has seen."""
    held = mini.held_out_data("results")
    assert choose_prompts("mini", None) == list(held.captions)
    pipe = mini.load_teacher()
    real = open_real_pictures(pipe, "mini", None, None, plan_evaluation(["a", "b"], None, 0))
    assert real is not None and real.size == (64, 64)
    first = next(iter(real))
    assert first.size == (64, 64)
    latents = held.latents[:1] / pipe.vae.config.scaling_factor
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample[0, :, 32, 32]
    pixel = torch.tensor(first.getpixel((32, 32))) / 127.5 - 1
    torch.testing.assert_close(pixel, expected.clamp(-1, 1), rtol=0, atol=0.01)
    assert (
        open_real_pictures(pipe, "mini", None, "own.txt", plan_evaluation(["a", "b"], None, 0))
        is None
    )


def test_larger_pictures_of_the_embedded_model_go_without_real_ones(capsys):
    large = plan_evaluation(["a", "b"], None, 0, size=(64, 128))
    assert open_real_pictures(mini.load_teacher(), "mini", None, None, large) is None
    assert "those at hand are 64×64, smaller than 128×64" in capsys.readouterr().out


def test_the_table_has_each_value_in_the_column_of_its_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    real = tmp_path / "real"
    real.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (20, 20), name).save(real / f"{name}.png")
    told = {"extractor": thumbnails(), "real": open_real(str(real), (16, 16))}
    found = api.evaluate(student(), make_settings(), tmp_path / "out", **told)
    print_evaluation(found)
    lines = [line for line in capsys.readouterr().out.split("\n") if "│" in line]
    shown, group = {}, ""
    for name, *cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines):
        group = group if any(cells) else name
        shown[group, name] = cells
    sides = ("student", "teacher", "teacher-other-seed")
    held = {(row.pictures, row.reference): f"{row.frechet:.3g}" for row in found.distributions}
    for reference, group in (("real", "real pictures"), (sides[2], "teacher, other noises")):
        expected = [held.get((side, reference), "") for side in sides]
        assert shown[f"against {group}", "frechet distance"] == expected
    scores = {each.pictures: f"{each.class_score:.3g}" for each in found.scores}
    assert shown["by itself", "class score"] == [scores[side] for side in sides]


def test_ctrl_c_says_what_goes_on(run, places, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "generate", stopped)
    prompts = ("--prompts", places / "prompts.txt", "--steps", 2)
    code, _, err = run("evaluate", "mini", "--out", tmp_path / "out", *prompts)
    assert (code, err) == (130, "convfusion: stopped: the same command continues from here\n")
    monkeypatch.setattr(sys.modules["convfusion.cli.evaluate"], "open_pipeline", stopped)
    code, _, err = run("evaluate", "mini", "--out", tmp_path / "out", *prompts)
    assert (code, err) == (130, "convfusion: interrupted\n")


def test_a_report_names_no_folder_of_this_machine(tmp_path):
    assert name_pipeline("mini") == "mini" and name_pipeline("org/name") == "org/name"
    assert (
        name_pipeline(str(tmp_path), str(tmp_path / "x")) == f"{tmp_path.name} with the blocks of x"
    )


MISTAKES = {
    "not converted": (["model"], "not converted, so there is nothing to compare"),
    "no prompts": (["model", "--prompts", None], "--prompts is needed"),
    "no such prompts": (["model", "--prompts", "gone.txt"], "cannot be read"),
    "empty prompts": (["model", "--prompts", "none.txt"], "has no prompts"),
    "uneven samples": (["model", "--samples", 3], "give 4 samples, or up to 2"),
    "other vae": (["model", "--teacher", "other-vae"], "twin: another vae (weights"),
    "no such teacher": (["model", "--teacher", "no/such"], "no/such is no pipeline"),
    "other family": (["mini", "--teacher", "model"], "not its teacher's twin"),
    "no extractor": (["mini", "--extractor", "empty"], "has no safetensors"),
    "a file": (["mini", "--extractor", "network.safetensors"], "is a file: TorchScript"),
    "no clip": (["mini", "--clip", "dino"], "knows no texts"),
    "no real": (["mini", "--real", "empty"], "has no pictures"),
    "no such real": (["mini", "--real", "gone"], "does not exist"),
    "prompts as real": (["mini", "--real", "prompts.txt"], "real pictures are asked for"),
    "small real": (["mini", "--real", "real"], "3× picture smaller than the size asked for"),
    "full folder": (["mini", "--out", "full"], "no evaluation: choose another folder"),
    "odd size": (["mini", "--size", "33x32"], "multiples of 8"),
    "many steps": (["mini", "--steps", 1001], "the noise schedule has 1000 timesteps"),
    "no guidance": (["mini", "--guidance", "nan"], "guidance must be from 0 to 1000, not nan"),
    "a large seed": (["mini", "--seed", 2**64 - 3], f"below 2⁶⁴, not {2**64}"),
    "an unknown network": (["mini", "--extractor", "resnet50"], "no name on the Hub, owner/name"),
    "an unknown clip": (["mini", "--clip", "clip"], "no name on the Hub, owner/name"),
    "no blocks": (["model", "--blocks", "empty"], "empty holds no trained blocks"),
    "a pipeline as blocks": (
        ["mini", "--blocks", "model"],
        "model is a whole pipeline, not blocks",
    ),
    "one sample": (["mini", "--samples", 1], "--samples"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_before_anything_is_drawn(run, places, tmp_path, mistake):
    given, message = MISTAKES[mistake]
    arguments = [places / each if (places / str(each)).exists() else each for each in given]
    options = {"--out": tmp_path / "out", "--prompts": places / "prompts.txt"}
    for name, value in options.items():
        if name not in given:
            arguments += [name, value]
    if None in arguments:
        place = arguments.index(None)
        del arguments[place - 1 : place + 1]
    code, said, err = run("evaluate", *arguments)
    assert code == 2
    assert message in err
    assert "drawing" not in said
    assert err.startswith("convfusion: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (places / "full").iterdir()] == ["thesis.tex"]
