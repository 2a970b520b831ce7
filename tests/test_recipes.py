"""Every script of the experiments starts: what it imports is there, and it says what it takes."""

import runpy
import sys
from pathlib import Path

import pytest

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
