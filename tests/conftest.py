"""Tests never reach for the network, and never depend on the order they run in."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: threads would be in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from tiny_pipelines import stable_diffusion

from convfusion import cli

# A test says what holds, not how fast, and says it of the same examples each time.
hypothesis.settings.register_profile("convfusion", deadline=None, derandomize=True)
hypothesis.settings.load_profile("convfusion")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerate():
    """Accelerate fixes its precision for the life of a process; a test may need another one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: exit status, standard output and error.

    Of the error, without the lines that say what begins, such as "Loading model …".
    """

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convfusion", *map(str, arguments)])
        capsys.readouterr()  # what fixtures have printed
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        err = "".join(line for line in lines if not line.endswith(" …\n"))
        return ended.value.code, out, err

    return call


@pytest.fixture
def model(tmp_path):
    """The folder of a small Stable Diffusion."""
    stable_diffusion().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The package datasets, with its cache out of the way."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    return datasets
