"""What `convfusion info` says of all that the commands take and write; and the main options."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_pipelines import stable_diffusion_3

import convfusion
from convfusion import checkpoint, mini
from convfusion.families import list_sites
from convfusion.files import write_tensors
from convfusion.mixers import Removed
from convfusion.surgery import uniform


def test_the_version_and_short_help(run):
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"convfusion {convfusion.__version__}")
    for words in ((), ("distill",), ("bench",), ("bench", "flops")):
        assert run(*words, "-h") == run(*words, "--help")
        assert run(*words, "-h")[0] == 0
    for command in ("convfusion", "convfusion.cli"):
        words = [sys.executable, "-m", command, "--version"]
        assert subprocess.run(words, capture_output=True, text=True).stdout.strip() == out.strip()


def test_a_pipeline_before_and_after(run, model, tmp_path):
    code, out, err = run("info", model)
    assert code == 0, err
    assert "StableDiffusionPipeline" in out and "UNet2DConditionModel" in out and "unet" in out
    assert "7 self-attention layers (sites)" in out and "Converted: no" in out
    assert f"Next: convfusion convert {model}" in out
    run("convert", model, "--out", tmp_path / "new", "--every", 2, "--config", "default")
    code, out, _ = run("info", tmp_path / "new")
    assert "4 of 7 sites (4 × delta_conv)" in out and "These blocks are untrained" in out
    run("convert", model, "--out", tmp_path / "small", "--drop-attention")
    code, out, _ = run("info", tmp_path / "small")
    assert code == 0 and "attention of these sites was dropped" in out


def test_attentions_that_a_text_shares_are_told(run, tmp_path):
    pipe = stable_diffusion_3()
    pipe.save_pretrained(tmp_path / "stock")
    shared = sum(site.joint is not None for site in list_sites(pipe.transformer))
    _, shown, _ = run("info", tmp_path / "stock")
    assert f"Text and image share {shared} of them" in " ".join(shown.split())
    assert str(convfusion.status(pipe)).count("shared with a text") == shared


def test_no_weights_are_needed(run, model):
    """Only the config of the denoiser: what it would take to load is not there."""
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    code, out, _ = run("info", model)
    assert code == 0 and "M parameters" in out


@pytest.mark.parametrize(
    ("trained", "origin", "said"),
    [
        (None, "attention", "Whether these blocks are trained is unknown"),
        ({"steps": 0}, "unknown", "Whether these blocks are trained is unknown"),
        ({"steps": 1200}, "attention", "These blocks are trained for 1,200 steps.\n"),
        ({"steps": 1200}, "unknown", "These blocks are trained for 1,200 steps.\n"),
        ({"steps": 0}, "released", "These blocks are trained by others.\n"),
        ({"steps": 9}, "released", "These blocks are trained by others, then for 9 steps.\n"),
        (False, "converted", "These blocks are untrained: pictures will"),
        (False, "attention", "These blocks are untrained, started from the attention: halo blocks"),
    ],
)
def test_blocks_say_whether_they_are_trained(run, tmp_path, trained, origin, said):
    checkpoint.save(mini.load_student("delta_conv"), tmp_path / "blocks")
    file = tmp_path / "blocks" / "convfusion.json"
    manifest = json.loads(file.read_text()) | {"trained": trained, "started_from": origin}
    if trained is None:
        del manifest["trained"]
    file.write_text(json.dumps(manifest))
    code, out, _ = run("info", tmp_path / "blocks")
    assert code == 0 and said in out and "7 sites (7 × delta_conv)" in out
    assert "Parameters: 0.21M" in out


def test_what_a_manifest_says_of_training_is_read_with_care(run, tmp_path):
    checkpoint.save(mini.load_student("delta_conv"), tmp_path / "blocks")
    file = tmp_path / "blocks" / "convfusion.json"
    manifest = json.loads(file.read_text())
    for wrong in ({"trained": True}, {"trained": {"steps": -1}}, {"started_from": "luck"}):
        file.write_text(json.dumps(manifest | wrong))
        code, _, err = run("info", tmp_path / "blocks")
        assert code == 2 and f"{file} is damaged" in err and err.count("\n") == 1


def test_mixers_with_nothing_to_train(run, model, tmp_path):
    uniform(Removed()).save(tmp_path / "removed.json")
    options = ("--config", tmp_path / "removed.json", "--out", tmp_path / "removed")
    code, out, err = run("convert", model, *options)
    assert code == 0 and "untrained" not in out, err
    code, out, _ = run("info", tmp_path / "removed")
    assert code == 0 and "These blocks have nothing to train." in out
    assert f"Next: convfusion generate {tmp_path / 'removed'}" in out


def test_a_run_that_was_stopped_and_is_resumed_from_its_folder(run, tmp_path):
    out = tmp_path / "run"
    options = ("--steps", 2, "--warmup", 1, "--batch-size", 2, "--learning-rate", 0.001)
    assert run("distill", "mini", "--out", out, *options)[0] == 0
    settings = (out / "run.toml").read_text()
    (out / "run.toml").write_text(settings.replace("\nsteps = 2\n", "\nsteps = 3\n"))
    code, told, _ = run("info", out)
    assert "2 of 3 steps done" in told and "Model: mini." in told
    assert f"Next: convfusion distill --out {out} --resume" in told
    code, told, err = run("distill", "--out", out, "--resume")
    assert code == 0, err
    assert "Continuing after step 2." in told
    assert f"Next: convfusion compare mini-teacher --blocks {out}" in told
    assert "3 of 3 steps done" in run("info", out)[1]
    config = json.loads((out / "checkpoints" / "step-0000003" / "trainer.json").read_text())
    assert config["config"]["learning_rate"] == 0.001
    (out / "run.toml").unlink()
    code, _, err = run("distill", "--out", out, "--resume")
    assert code == 2 and "keeps no settings of a run" in err and err.count("\n") == 1


def test_a_cache(run, model, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 16), "red").save(tmp_path / "pictures" / "red.png")
    (tmp_path / "pictures" / "red.txt").write_text("red apple")
    (tmp_path / "pictures" / "bare.png").write_bytes(b"nothing")
    (tmp_path / "pictures" / "bare.txt").write_text("nothing")
    data = ("--data", tmp_path / "pictures", "--workers", 0)
    code, out, err = run("cache", model, *data, "--out", tmp_path / "cache")
    assert code == 0, err
    assert f"Next: convfusion distill {model} --data {tmp_path / 'cache'}" in out
    code, out, _ = run("info", tmp_path / "cache")
    assert code == 0 and "1 samples (1 at 16x16)" in out and "Skipped: 1" in out


def test_reports_and_single_files(run, tmp_path):
    (tmp_path / "demo.json").write_text("{}")
    assert "results of `convfusion demo`" in run("info", tmp_path)[1]
    file = tmp_path / "x.safetensors"
    for name, said in (
        ("model.diffusion_model.input_blocks.0.weight", "for a StableDiffusionPipeline"),
        ("base:transformer_blocks.0.conv1.gates.0.conv_spatial.weight", "authors released"),
    ):
        write_tensors(file, {name: torch.zeros(2)})
        assert said in run("info", file)[1]
    write_tensors(file, {"x": torch.zeros(2)})
    assert "no model or blocks" in run("info", file)[2]
    (tmp_path / "empty").mkdir()
    assert "holds nothing that ConvFusion knows" in run("info", tmp_path / "empty")[2]
    code, _, err = run("info", "no/such")
    assert code == 2 and err.count("\n") == 1
