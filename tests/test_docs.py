"""What the pages say is what the results say, and what they name is there."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import convfusion
from convfusion import analysis, bench, cli, data, distill, evaluate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes/mini/README.md", *sorted((ROOT / "docs").glob("*.md"))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `convfusion …` of a page, launchers too."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [
        words[i + 1 :]
        for words in found
        for i, word in enumerate(words)
        if word == "convfusion.cli" or (word == "convfusion" and i == 0)
    ]


def test_measured_tables_are_those_of_the_results():
    command = [sys.executable, ROOT / "recipes" / "tables.py", "--check"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@every_page
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@every_page
def test_every_command_of_a_page_is_one(page):
    for words in commands(page):
        command = typer.main.get_command(cli.app)
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        command.make_context("convfusion", list(words))  # raises for what it does not know


@every_page
def test_every_import_of_a_page_is_there(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("convfusion"):
                module = importlib.import_module(node.module)
                assert all(getattr(module, name.name, None) is not None for name in node.names)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "convfusion":
                assert hasattr(convfusion, node.attr), node.attr


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    for path in listed:
        module, name = path.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), name), path
    public = {f"convfusion.{name}" for name in convfusion.__all__ if not name.startswith("_")}
    for part in (analysis, bench, data, distill, evaluate):
        public |= {f"{part.__name__}.{name}" for name in part.__all__ if not name.isupper()}
    assert sorted(public - set(listed)) == []
    assert len(listed) == len(set(listed))
