"""The examples run from end to end, as a newcomer starts them."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import mini

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


def test_every_example_is_tested():
    tested = {"convert_your_model.py", "distill_your_model.py"}
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
