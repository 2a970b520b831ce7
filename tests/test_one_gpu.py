"""docs/one-gpu.md, command by command, on a tiny model of SD1.5's layout."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_models import sd15
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import cli
from convfusion.cli.options import parse_size
from convfusion.distill.settings import read_settings
from convfusion.surgery import presets

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "configs" / "one-gpu-sd15.toml"
SHORTER = {  # what is appended to the commands of the page, so that a test can wait for them
    "cache": "--steps 2 --per-prompt 2",
    "distill": "--size 32x32",
    "distill --out": "--size 32x32 --steps 2 --imitation-steps 1 --warmup 1 --held-out 2 "
    "--batch-size 4 --prompt red",
    "evaluate": "--steps 2 --samples 6 --batch-size 6",
    "generate": "--steps 4",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the page says that one needs, of a sixteenth of the size."""
    torch.manual_seed(3)
    pipe = stable_diffusion()
    pipe.register_modules(unet=sd15().eval())
    pipe.save_pretrained(tmp_path / "my-finetune")
    (tmp_path / "prompts.txt").write_text("red apple\ngreen apple\n")
    (tmp_path / "others.txt").write_text("red\ngreen\napple\n")
    (tmp_path / "configs").symlink_to(SETTINGS.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines() -> list[str]:
    """The commands of the page but `plan`, which measures for long; test_plan.py has it."""
    page = (ROOT / "docs" / "one-gpu.md").read_text()
    code = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    found = [line for line in code.splitlines() if line.startswith("convfusion ")]
    return [line for line in found if line.split()[1] != "plan"]


def run(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0, line


def test_the_page(place, monkeypatch, capsys, fresh_accelerate):
    assert [line.split()[1] for line in lines()] == [
        *("cache", "distill", "distill", "evaluate", "generate", "convert", "generate")
    ]
    for line in lines():
        command = line.split()[1]
        written = command == "distill" and "--dry-run" not in line
        more = SHORTER.get("distill --out" if written else command, "")
        small = line.replace("512x512", "32x32").replace("1024x1024", "64x64")
        run(f"{small} {more}", monkeypatch)
        said = capsys.readouterr().out
        if "--dry-run" in line:  # the run file as it is, but for its size
            assert "16 of 16" in said and "all 20000 steps" in said
            assert "accumulation = 4" in said and not (place / "run").exists()
    assert (place / "run" / "README.md").is_file()
    assert (place / "evaluation" / "report.html").is_file()
    status = convfusion.status(convfusion.load_pipeline(place / "my-finetune-conv"))
    assert status.converted == 16 and not any(row.attention_kept for row in status.sites)
    assert len(list((place / "convfusion-pictures").glob("*.png"))) == 2


def test_the_run_file_is_for_the_real_model():
    settings = read_settings(SETTINGS, {})
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert settings.config == presets.choose_preset(unet)
    assert convfusion.convert(unet, settings.config).converted == 16
    assert parse_size(settings.size) == (unet.config.sample_size * 8,) * 2
