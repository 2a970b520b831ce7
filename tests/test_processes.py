"""Two processes on the CPU take the steps that one takes with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from convfusion import ConvFusionError, files
from convfusion.distill import DistillConfig
from convfusion.distill.batches import StepBatches

pytestmark = pytest.mark.libraries

SCRIPT = Path(__file__).parent / "two_processes.py"
# The folder of a script is on its path, so it finds the tests beside it.
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(out, processes, *options):
    launcher = LAUNCH if processes == 2 else []
    command = [sys.executable, *launcher, SCRIPT, out, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return files.read_tensors(out / "blocks.safetensors"), losses


def test_two_processes_step_as_one(tmp_path):
    """In both stages, with gradient checkpointing; one process has the batch whole."""
    together, told = launched(tmp_path / "two", 2, 1)
    alone, expected = launched(tmp_path / "one", 1, 1)
    assert together.keys() == alone.keys()
    for name, tensor in together.items():  # 1e-4: a hundredth of what a step moves a weight by
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-4, msg=name)
    key = "held_out/epsilon_error"
    errors = [[line[key] for line in lines if key in line] for lines in (told, expected)]
    assert len(errors[0]) == 2 and errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ConvFusionError, match="4 is not a multiple of 3 processes × 1 parts"):
        StepBatches(SimpleNamespace(groups=[range(4)]), DistillConfig(batch_size=4), 1000, (0, 3))
