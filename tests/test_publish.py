"""docs/publish.md, block by block, against a Hub on this machine and the real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from local_hub import TOKEN, served
from tiny_models import sd15
from tiny_pipelines import stable_diffusion

import convfusion

pytestmark = pytest.mark.libraries

PAGE = Path(__file__).parent.parent / "docs" / "publish.md"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NAME = "me/sd15-halo"

# What runs the page, in a process whose client looks for the Hub on this machine.
READER = """
import pathlib, re, shlex, sys
import torch
import huggingface_hub
from convfusion.cli import main

SMALL = "--steps 2 --size 32x32"
SHORTER = {"convert": "--size 32x32", "evaluate": SMALL, "generate": SMALL}

def type_in(line):
    words = shlex.split(line, comments=True)
    sys.argv = [*words, *shlex.split(SHORTER.get(words[1], ""))]
    print(f"$ {line}", flush=True)
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, line
    if words[1] == "convert":  # and a checkpoint, as a training leaves them, which must stay here
        pathlib.Path("run/checkpoints").mkdir()
        pathlib.Path("run/checkpoints/state.safetensors").write_bytes(b"large")

names = {}
page = open(sys.argv[1], encoding="utf-8").read()
for language, code in re.findall(r"^```(sh|python)\\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
    if language == "python":
        exec(compile(code, "publish.md", "exec"), names)
    for line in code.replace("\\\\\\n", " ").splitlines() if language == "sh" else ():
        if line.startswith("convfusion "):
            type_in(line)
        elif line:
            raise SystemExit(f"not run: {line}")
state = names["pipe"].unet.state_dict()
torch.save({key: value for key, value in state.items() if ".mixer." in key}, "loaded.pt")
huggingface_hub.constants.HF_HUB_OFFLINE = True
type_in("convfusion generate BASE --blocks NAME --prompt apple --out offline.png")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of SD1.5's layout that is not trained, and prompts."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(3)
    pipe = stable_diffusion()
    pipe.register_modules(unet=sd15().eval())
    pipe.save_pretrained(root / "base")
    for name in ("prompts.txt", "others.txt"):
        (root / name).write_text("red\ngreen\napple\n")
    return root


@pytest.fixture(scope="module")
def read(place):
    """The page, run once in a fresh process: what it printed, and the Hub that it left."""
    script = READER.replace("BASE", BASE).replace("NAME", NAME)
    with served() as (hub, address):
        hub.add_folder(BASE, place / "base")
        variables = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "home")}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        ran = subprocess.run(
            [sys.executable, "-c", script, str(PAGE)],
            cwd=place,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.replace(address, "HUB"), hub


def test_what_the_page_pushes_comes_back_by_name(place, read):
    said, hub = read
    before, after = said.split(f"$ convfusion push run {NAME}", 2)[1:]
    assert "would go this card" in before and "Sent:" not in before
    assert f"Sent: HUB/{NAME}/commit/" in after
    files = hub.read(NAME)
    told = {"README.md", "blocks.safetensors", "convfusion.json", "evaluation/evaluation.csv"}
    assert files.keys() == told | {".gitattributes"}
    for name in ("blocks.safetensors", "convfusion.json"):
        assert files[name] == (place / "run" / name).read_bytes()
    ours = stable_diffusion()
    ours.register_modules(unet=sd15().eval())
    convfusion.load(ours, place / "run")
    state = ours.unet.state_dict()
    loaded = torch.load(place / "loaded.pt")
    assert len(loaded) > 16 and all(torch.equal(loaded[key], state[key]) for key in loaded)
    assert (place / "offline.png").is_file()
    assert set(hub.branches[NAME]) == {"main", "v2"} and hub.private == set()


def test_only_blocks_and_manifest_are_fetched(read):
    _, hub = read
    fetched = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    names = {path.rsplit("/", 1)[1] for path in fetched if path.startswith(f"/{NAME}/")}
    assert names == {"blocks.safetensors", "convfusion.json"}


def test_the_card_of_the_page(place, read):
    _, hub = read
    card = huggingface_hub.ModelCard(hub.read(NAME)["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "convfusion",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["convfusion", "attention-free"],
    }
    evaluated = json.loads((place / "run" / "evaluation" / "evaluation.json").read_text())
    assert "| ε-error, 0 is equal |" in card.text and "Means with standard errors" in card.text
    assert f"over {evaluated['settings']['samples']} pictures" in card.text
    for line in (
        f'pipe = DiffusionPipeline.from_pretrained("{BASE}", use_safetensors=True)',
        f'convfusion.load(pipe, "{NAME}")',
        f"convfusion generate {BASE} --blocks {NAME} --prompt",
        "put `blocks.safetensors` into `ComfyUI/models/model_patches`",
        "These blocks are not trained, started from the attention.",
    ):
        assert line in card.text
    assert "this-folder" not in card.text
