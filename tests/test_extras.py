"""Without an optional library every command works, or names the extra before any work."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from convfusion.errors import ConvFusionError
from convfusion.imports import EXTRAS, check_installed, explained, is_installed

WITHOUT = """
import json, sys
for name in sys.argv[2].split():
    sys.modules[name] = None
import contextlib, io
from convfusion.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["convfusion", *command]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    print(json.dumps([status, told.getvalue()]))
"""
OTHERS = ("peft", "webdataset", "bitsandbytes", "tensorboardX")


def test_every_command_works_or_names_what_it_needs(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("red apple")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    (tmp_path / "prompts.txt").write_text("red apple\ngreen apple\n")

    def out(name):
        return ["--out", str(tmp_path / name)]

    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"]
    plot = ["--plot", str(tmp_path / "x.png")]
    fast = ["--steps", "1", "--batch-size", "1"]
    cases = [
        (["bench", "flops", "mini", "--size", "64x64"], None),
        (["bench", "latency", "mini", "--size", "64x64", *plot], "analysis"),
        (["plan", "mini", "--size", "64x64"], None),
        (["generate", "mini", "--prompt", "red apple", "--steps", "1", *out("drawn")], None),
        (["convert", "mini", *out("converted")], None),
        (["cache", "mini", "--data", str(tmp_path / "pictures"), *out("cache")], None),
        (["cache", "mini", "--data", str(tmp_path / "t.parquet"), *out("table")], "data"),
        (["distill", "mini-teacher", *fast, *out("run")], None),
        (["distill", "mini-teacher", *fast, "--tracker", "tensorboard", *out("seen")], "train"),
        (["ablate", "mini", *prompts, "--window", "3", *out("ablation")], None),
        (["analyze", "mini", *prompts, *out("report")], "analysis"),
        (["curve", "mini", *out("curve")], "analysis"),
        (["evaluate", "mini", *prompts, *out("evaluation")], "eval"),
        (["export", "mini", *out("x.onnx")], "onnx"),
        (["export", "mini", "--pipeline", *out("whole")], "onnx"),
        (["app", "mini"], "app"),
    ]  # fmt: skip
    commands = json.dumps([command for command, _ in cases])
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, commands, " ".join((*EXTRAS, *OTHERS))],
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == len(cases), ran.stderr
    for (command, extra), (status, said) in zip(cases, found, strict=True):
        assert status == (2 if extra else 0), (command, said)
        if extra:
            assert f"pip install 'convfusion[{extra}]'" in said and said.count("\n") == 1
    left = {
        "pictures",
        "t.parquet",
        "prompts.txt",
        "drawn",
        "converted",
        "cache",
        "run",
        "ablation",
    }
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_library_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not is_installed("matplotlib") and is_installed("torch")
    with pytest.raises(ConvFusionError, match=r"needs matplotlib: pip install .*\[analysis\]', or"):
        check_installed("matplotlib", advice="do without")
    error = ImportError("no", name="onnxscript.values")
    assert explained(error) == "onnxscript cannot be imported: pip install 'convfusion[onnx]'"
    assert explained(ImportError("no", name="torch")) is None and explained(ImportError()) is None
