"""Tests never reach for the network, and never depend on the order they run in."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: threads would be in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

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
