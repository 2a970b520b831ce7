"""The examples run from end to end, as a newcomer starts them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_export_pipeline import converted
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import ConvertConfig, DeltaConv, Halo, mini
from convfusion.evaluate.images import psnr
from convfusion.export import export_pipeline
from convfusion.families import latent_scale
from convfusion.generate import generate

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Run an example in an empty folder, with arguments."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_convert_the_embedded_model(start, tmp_path, capsys):
    start("convert_your_model.py")
    assert "7 of 7 self-attention sites converted" in capsys.readouterr().out
    written = convfusion.load_pipeline(tmp_path / "run" / "converted")
    assert convfusion.status(written).converted == 7


def test_convert_your_model(start, model, tmp_path, capsys):
    start("convert_your_model.py", model, "--out", "mine")
    assert "After revert: 0 of 7 sites converted" in capsys.readouterr().out
    assert convfusion.status(convfusion.load_pipeline(tmp_path / "mine")).converted == 7


def test_distil_the_embedded_model(start, tmp_path):
    start("distill_your_model.py", "--steps", 1)
    assert Image.open(tmp_path / "run" / "blocks" / "picture.png").size == (64, 64)


def test_distil_your_model(start, model, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 16), "red").save(tmp_path / "pictures" / "red.png")
    (tmp_path / "pictures" / "red.txt").write_text("red apple")
    start("distill_your_model.py", model, "--data", "pictures", "--size", 16, "--steps", 1)
    pipe = stable_diffusion()
    assert convfusion.load(pipe, tmp_path / "run" / "blocks").converted == 7
    assert Image.open(tmp_path / "run" / "blocks" / "picture.png").size == (16, 16)


WITHOUT = """
import runpy, sys

for name in ("torch", "diffusers", "transformers", "convfusion"):
    sys.modules[name] = None  # which fails where one of them is imported
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_onnx_generate_draws_what_the_pipeline_draws(tmp_path):
    kinds = {"mid_block.*": Halo(), "*": DeltaConv(kernel_size=3)}  # each is traced: one is a halo
    pipe = converted("sd", ConvertConfig(kinds))
    export_pipeline(pipe, tmp_path / "onnx", guidance=3.0)
    for prompts, size in ((["red apple"], (16, 24)), (["apple", "green apple"], (16, 16))):
        sides = (len(prompts), 4, *(side // latent_scale(pipe) for side in size))
        latents = torch.randn(sides, generator=torch.Generator().manual_seed(7))
        np.save(tmp_path / "latents.npy", latents.numpy())
        command = [EXAMPLES / "onnx_generate.py", tmp_path / "onnx", "--steps", 3]
        command += [word for prompt in prompts for word in ("--prompt", prompt)]
        command += ["--latents", tmp_path / "latents.npy", "--out", tmp_path / "drawn.png"]
        subprocess.run([sys.executable, "-c", WITHOUT, *map(str, command)], check=True)
        names = ["drawn.png"] if len(prompts) == 1 else ["drawn-0.png", "drawn-1.png"]
        drawn = [Image.open(tmp_path / name) for name in names]
        expected = generate(pipe, prompts, steps=3, guidance=3.0, size=size, latents=latents)
        assert [picture.size for picture in drawn] == [size[::-1]] * len(prompts)
        assert min(map(psnr, drawn, expected)) >= 40


def test_every_example_is_tested():
    tested = {"convert_your_model.py", "distill_your_model.py", "onnx_generate.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_the_scripts_in_the_readme_run_as_they_are_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {}  # the second goes on from the first
    for script in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(script, "README.md", "exec"), names)
    assert len(convfusion.status(names["pipe"]).sites) == convfusion.status(names["pipe"]).converted
    assert "7 of 7 self-attention sites converted" in capsys.readouterr().out
    assert Image.open("apple.png").size == (64, 64)
    pipe = mini.load_teacher()
    assert convfusion.load(pipe, "blocks").converted == 7
