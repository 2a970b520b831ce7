"""What the pages say is what the results say, and what they name is there."""

import ast
import csv
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
PAGES = [
    ROOT / "README.md",
    ROOT / "recipes/mini/README.md",
    ROOT / "recipes/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

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


def test_no_table_mixes_lists_of_pictures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    which = importlib.import_module("pages").which
    assert "list `choice`" in which([{"held_out": "choice"}] * 2)
    with pytest.raises(ValueError, match="choice, first"):
        which([{"held_out": "choice"}, {"held_out": "first"}])


def test_the_page_of_the_recipes_has_every_script_and_its_results():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "recipes/README.md").read_text().splitlines()
        if re.match(r"\| `\w+\.py", line)
    ]
    scripts = {path.name for path in (ROOT / "recipes").glob("*.py") if runs(path)}
    assert {row[0].strip("`").split()[0] for row in rows} == scripts - {"tables.py"}
    for name in (name for row in rows for name in re.findall(r"`([^`]+)`", row[2])):
        assert list((ROOT / "results").glob(name)), name


def runs(path: Path) -> bool:
    """Whether a module is a script."""
    return "__main__" in path.read_text(encoding="utf-8")


def distances(name: str) -> list[dict[str, str]]:
    """The rows of a table of results that have a kernel distance."""
    with open(ROOT / "results" / name, newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("kid")]


def standard_errors(row: dict[str, str]) -> float:
    """How far a student is from its teacher, in standard errors of the difference."""
    return float(row["kid_excess"]) / float(row["kid_excess_error"])


def test_every_value_with_an_error_is_one_of_the_results():
    prose = re.sub(r"^\|.*", "", (ROOT / "docs/quality.md").read_text(), flags=re.MULTILINE)
    measured = {
        f"{1000 * float(row[kind]):.1f} ± {1000 * float(row[kind + '_error']):.1f}"
        for table in (ROOT / "results").glob("*.csv")
        for row in distances(table.name)
        for kind in ("kid", "kid_excess")
        if row[kind]
    }
    found = re.findall(r"[-−]?\d+\.\d+\s±\s\d+\.\d+", prose)
    assert len(found) > 5
    assert {re.sub(r"\s", " ", each).replace("−", "-") for each in found} - measured == set()


def test_what_can_be_told_apart_is_beyond_two_standard_errors():
    text = " ".join((ROOT / "docs/quality.md").read_text().split())
    real = {
        row["mixer"]: row for row in distances("rivals_pictures.csv") if row["reference"] == "real"
    }
    window = standard_errors(real["13×13 neighbourhood attention"])
    by_field = "neighbourhood attention as wide as the recommended kernels"
    recommended = standard_errors(real[by_field])
    assert window > 2 > recommended
    assert "13×13 window can be told from its teacher" in text and f"({window:.1f} standard" in text
    assert f"recommended ones cannot (0.9 ± 0.5, {recommended:.1f} standard errors;" in text
    rows = [r for r in distances("sizes.csv") if r["pipeline"] == "the student shipped before"]
    apart = [f"{r['width']}×{r['height']}" for r in rows if abs(standard_errors(r)) > 2]
    assert (apart, len(rows)) == (["64×64"], 5)
    assert f"48 pictures tell the two apart at {apart[0]} alone" in text
    assert "at none of the four others by two standard errors" in text


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
        assert not hasattr(command, "commands"), f"{words[:1]} is no command"
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
