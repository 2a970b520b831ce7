"""What the command line prints, on any terminal and of any text, and what it checks first."""

import os
import subprocess
import sys

import pytest

from convfusion.cli.cache import print_cache
from convfusion.cli.console import steady_streams

FLOPS = ["bench", "flops", "mini", "--size", "64x64"]


def start(*command, encoding="utf-8", **options):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "convfusion.cli", *map(str, command)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("command", [FLOPS, ["distill", "--help"]])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_that_is_no_unicode_gets_all_lines(command, encoding):
    with start(*command, encoding=encoding, stdout=subprocess.PIPE) as ran:
        said, error = ran.communicate()
    assert ran.returncode == 0, error
    said.decode(encoding)
    assert len(said.splitlines()) > 10 and (b"?" in said or encoding == "cp1252")


def test_an_output_that_nobody_reads_any_more_is_no_traceback():
    with start(*FLOPS, stdout=subprocess.PIPE) as ran:
        ran.stdout.close()
        error = ran.stderr.read()
    assert error == b""


def test_names_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = ["[/b] [red]x", ":smile:.png", "caf\udce9.png"]
    steady_streams()
    skipped = {"[bold]no caption": {"count": 3, "names": names}}
    facts = {"sizes": [(16, 16)], "groups": [[0]], "skipped": skipped, "__len__": lambda self: 1}
    built = type("Built", (), facts)()
    print_cache(built)
    said = capsys.readouterr().out
    assert "[/b] [red]x" in said and ":smile:.png" in said and "[bold]no caption" in said


LATE = {
    "precision of a run": (["distill", "mini", "--out", "x", "--precision", "half"], "precision"),
    "device of a run": (["distill", "mini", "--out", "x", "--device", "gpu7"], "gpu7"),
    "tracker": (["distill", "mini", "--out", "x", "--tracker", "paper"], "the tracker 'paper'"),
    "revision": (["distill", "mini", "--out", "x", "--revision", "main"], "--revision"),
    "cache": (["cache", "nowhere", "--out", "x", "--data", "y", "--device", "gpu7"], "gpu7"),
    "drawing": (["cache", "nowhere", "--out", "x", "--data", "DATA", "--seed", "-1"], "seeds must"),
    "analyze": (["analyze", "nowhere", "--out", "x", "--precision", "half"], "precision"),
    "ablate": (["ablate", "nowhere", "--out", "x", "--device", "gpu7"], "gpu7"),
    "curve": (["curve", "nowhere", "--out", "x", "--precision", "half"], "precision"),
    "convert": (["convert", "nowhere", "--out", "x", "--precision", "half"], "precision"),
    "plan": (["plan", "nowhere", "--size", "64x64", "--precision", "half"], "precision"),
    "generate": (["generate", "nowhere", "--prompt", "a", "--seed", "-1"], "seeds must"),
    "guidance": (["generate", "nowhere", "--prompt", "a", "--guidance", "-2"], "guidance must"),
    "export": (["export", "nowhere", "--out", "DATA/x.onnx"], "is no folder"),
    "ending": (["export", "nowhere", "--out", "x.pt"], "must end in .onnx"),
    "extractor": (["evaluate", "mini", "--out", "x", "--extractor", "none"], "none is no folder"),
    "clip": (["evaluate", "mini", "--out", "x", "--clip", "DATA"], "is a file"),
    "real": (["evaluate", "mini", "--out", "x", "--real", "gone"], "gone does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_what_is_wrong_is_told_before_a_model_is_loaded(run, tmp_path, monkeypatch, case):
    command, message = LATE[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\n")

    def load(*arguments, **options):
        raise AssertionError("a model is loaded")

    for module in ("models", "cache", "distill", "evaluate", "generate", "export", "convert"):
        monkeypatch.setattr(f"convfusion.cli.{module}.open_pipeline", load, raising=False)
    code, out, err = run(*(word.replace("DATA", "prompts.txt") for word in command))
    assert code == 2 and message in err and err.count("\n") == 1
    assert out == "" and [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
