"""examples/one_gpu.ipynb: its cells run in order, on a tiny model of SD1.5's layout."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_hub import Api
from tiny_models import sd15
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion.checkpoint import hub

NOTEBOOK = Path(__file__).parent.parent / "examples" / "one_gpu.ipynb"
SMALLER = {
    "MODEL": "base",
    "SIZE": 32,
    "PER_PROMPT": 2,
    "DRAWING_STEPS": 2,
    "STEPS": 2,
    "IMITATION_STEPS": 1,
    "CHANGES": {"warmup": 1, "held_out": 2, "batch_size": 4, "ema": 0.5},
    "REPOSITORY": "me/blocks",
    "SETTINGS": str(NOTEBOOK.parent.parent / "configs" / "one-gpu-sd15.toml"),
}


def read_cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the notebook says that one needs, and a Hub in memory."""
    torch.manual_seed(3)
    pipe = stable_diffusion()
    pipe.register_modules(unet=sd15().eval())
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("red apple\ngreen apple\n")
    (tmp_path / "others.txt").write_text("red\ngreen\napple\n")
    monkeypatch.chdir(tmp_path)
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return tmp_path, api


def test_the_notebook_from_top_to_bottom(place, fresh_accelerate, capsys):
    folder, api = place
    names = {}
    for number, cell in enumerate(read_cells()):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert SMALLER.keys() <= names.keys()
            names |= SMALLER
    said = capsys.readouterr().out
    assert "16 of 16 self-attention sites converted" in said and "2 steps, ε-error" in said
    assert names["result"].steps == 2 and len(names["cache"]) == 4
    out = folder / "one-gpu"
    assert (out / "run" / "evaluation" / "report.html").is_file()
    assert Image.open(out / "comparison.png").height > 2 * 32
    assert convfusion.load(names["pipe"], out / "run").converted == 16
    card = api.files["README.md"].decode()
    assert "license: creativeml-openrail-m" in card and "Means with standard errors" in card
    assert "https://hub/commit/1" in said


def test_the_notebook_is_stored_as_jupyter_reads_it_and_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_links_of_the_notebook_are_there():
    text = "".join("".join(c["source"]) for c in read_cells() if c["cell_type"] == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)
