"""Text of others stays text, wherever it is written."""

import ast
import json
import sys

import pytest

from convfusion import files
from convfusion.checkpoint.card import plain_card
from convfusion.distill.settings import RunSettings, as_toml, read_settings
from convfusion.text import (
    address,
    markdown_block,
    markdown_code,
    markdown_text,
    one_line,
    python_string,
    toml_string,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = [
    "plain/name-1.5_x",
    'x"); __import__("os").system("id"); ("',
    "two\nlines\r\n\u2028\x85and\tmore\x00\x7f",
    "back\\slash'quote\"",
    "# heading\n\n<script>alert(1)</script>\n[link](http://x.y)",
    "```\n![](http://x.y/z.png)\n```",
    "| a | table |\n|---|---|",
    "ε 猫 😀 \u202eright to left",
    "{base} {0} %s $x$ :smile: [red]",
    '"this-folder"',
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_strings_read_back_from_toml_and_python(tmp_path, name):
    assert tomllib.loads(f"name = {toml_string(name)}") == {"name": name}
    for text in (name, name + "\udcff"):  # as of a file name that is no UTF-8
        (line,) = ast.parse(python_string(text)).body
        assert line.value.value == text and "\n" not in python_string(text)
        files.write_text(tmp_path / "python", python_string(text))
    settings = RunSettings(model=name, data=name, size="64x64")
    files.write_text(tmp_path / "run.toml", as_toml(settings))
    assert read_settings(tmp_path / "run.toml", {}) == settings
    files.write_text(tmp_path / "run.toml", as_toml(RunSettings(model=name + "\udcff")))
    assert read_settings(tmp_path / "run.toml", {}).model == name + "\ufffd"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_of_a_strangers_manifest_holds_no_markup(name):
    mixer = {"kind": name, name: name, "stages": [name]}
    manifest = {"version": name, "base_model": name, "sites": {"a": {"mixer": mixer}}}
    card = plain_card(manifest | {"family": name})
    head, code = card.split("```python\n", 1)
    block = code.split("\n```\n", 1)[0]
    statements = ast.parse(block).body
    assert len(statements) == 4 and "system" not in ast.dump(statements[2].value.func)
    assert ast.literal_eval(statements[2].value.args[0]) == (name or "the base model")
    assert "<script" not in card and "](http" not in card.replace(block, "")
    lines = card.splitlines()
    assert sum(line.startswith("#") for line in lines) == 5
    assert not any(line.startswith("|") for line in lines)
    assert ("base_model: " in head) == (name == NAMES[0])


def test_markdown_keeps_ordinary_names_and_escapes_the_rest():
    assert markdown_text("mini-teacher") == "mini-teacher"
    assert markdown_text("them/base-v1.5") == "them/base-v1.5"
    assert markdown_text("a_b*c|d _e_") == r"a_b\*c\|d \_e\_"
    assert markdown_text("<b> & # - 1.") == r"&lt;b&gt; &amp; \# \- 1."
    assert markdown_text("1. one") == r"1\. one"
    assert markdown_text("see http://x.y, www.x.y") == r"see http\://x.y, www\.x.y"
    assert markdown_code("a`b") == "``a`b``" and markdown_code("``") == "``` `` ```"
    assert markdown_block("text", "a\n````\nb") == "`````text\na\n````\nb\n`````"
    assert address("validation/a b)<.png") == "validation/a%20b%29%3C.png"
    assert one_line("a\r\nb\udcff") == "a b\ufffd"


def test_files_are_utf_8_whatever_the_text(tmp_path):
    told = {"name": "ε\udcff"}
    files.write_text(tmp_path / "a.json", json.dumps(told, ensure_ascii=False) + "\n")
    assert (tmp_path / "a.json").read_bytes() == b'{"name": "\xce\xb5\\udcff"}\n'
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == told
