"""Every script of the experiments starts: what it imports is there, and it says what it takes."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from convfusion import ConvertConfig, DeltaConv, convert, mini
from convfusion.mixers import Circular, Depthwise, Halo, Neighbourhood, Pooled, Removed

RECIPES = Path(__file__).parent.parent / "recipes"
SCRIPTS = sorted(
    path for path in RECIPES.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_script_starts(script, monkeypatch, capsys):
    held = set(sys.modules)
    for folder in (RECIPES, RECIPES / "mini"):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
    finally:  # their names are short, and others have them too
        for name in set(sys.modules) - held:
            if RECIPES in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]
    assert not stopped.value.code
    assert f"usage: {script.name}" in capsys.readouterr().out


def test_no_script_reads_what_is_private_to_the_package():
    for script in RECIPES.rglob("*.py"):
        for line in script.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith(("from convfusion", "import convfusion")):
                assert " _" not in line and "._" not in line, (script, line)


@pytest.fixture
def reach(monkeypatch):
    """The module of the recipes that says how far mixers look."""
    monkeypatch.syspath_prepend(RECIPES)
    yield importlib.import_module("reach")
    del sys.modules["reach"]


@pytest.mark.parametrize(
    ("mixer", "held"),
    [
        (Halo(window=8), 64 / 256),
        (Halo(window=6, cells=0), 36 / 256),
        (Neighbourhood(7), 49 / 256),
        (Neighbourhood(31), 1.0),
        (Circular(2), 2116 / 256**2),  # 9 tokens inside, 6 at the edges, 4 in the corners
        (Depthwise(3), 9 / 256),
        (DeltaConv(kernel_size=3, stages=1), 9 / 256),
        (DeltaConv(kernel_size=7, stages=2), 14 * 14 / 256),  # 7 tokens of twice the side
        (DeltaConv(kernel_size=7, stages=3), 1.0),
        (Pooled(), 1.0),
        (Removed(), 0.0),
    ],
    ids=str,
)
def test_a_window_holds_its_share_of_the_grid(reach, mixer, held):
    assert reach.share_of(mixer, (16, 16)) == pytest.approx(held)


def test_a_model_is_judged_at_its_largest_grid(reach):
    pipe = mini.load_teacher()
    sites = {"down_blocks.0.*": Depthwise(3), "down_blocks.1.*": Neighbourhood(7)}
    convert(pipe, ConvertConfig(sites))  # on 16×16 and on 8×8 tokens
    assert reach.window_share(pipe, (16, 16)) == pytest.approx(9 / 256)
