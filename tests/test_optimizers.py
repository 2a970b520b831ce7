"""The optimisers: Muon for matrices and AdamW for the rest, and what is kept of them."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_resume import CONFIG, converted, samples
from tiny_pipelines import block_weights

from convfusion import ConvFusionError
from convfusion.distill import DistillConfig, distill
from convfusion.distill.optimizers import check_optimizer, make_optimizer, state_per_number
from convfusion.distill.state import last_checkpoint, optimizer_tensors
from convfusion.files import read_tensors
from convfusion.surgery import mixers_of

MUON = DistillConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch < 2.9")


def block():
    """Parameters with gradients, of a block and of a copy."""
    mixer = next(iter(mixers_of(converted()).values()))
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return mixer


@needs_muon
def test_projections_take_steps_of_muon_and_the_rest_of_adamw():
    mixer, plain = block(), block()
    matrices = {name for name, p in plain.named_parameters() if p.ndim == 2}
    assert {"proj_in.weight", "proj_out.weight", "mean_proj.weight"} == matrices
    parts = [
        torch.optim.Muon(
            [p for n, p in plain.named_parameters() if n in matrices],
            lr=1e-2,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for n, p in plain.named_parameters() if n not in matrices],
            lr=1e-2,
            betas=MUON.betas,
            weight_decay=0.1,
        ),
    ]
    optimizer = make_optimizer(mixer.parameters(), MUON)
    for _ in range(3):
        optimizer.step()
        for part in parts:
            part.step()
    for (name, found), expected in zip(mixer.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected), name


@needs_muon
def test_all_parts_follow_one_rate():
    """A rate of 0 moves nothing: the trainer sets it on every group."""
    mixer, untouched = block(), block()
    optimizer = make_optimizer(mixer.parameters(), MUON)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for found, expected in zip(mixer.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(found, expected)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in mixer.parameters())


@needs_muon
def test_a_loaded_state_is_that_of_all_parts():
    mixer, other = block(), block()
    optimizer, loaded = (make_optimizer(m.parameters(), MUON) for m in (mixer, other))
    optimizer.step()
    other.load_state_dict(mixer.state_dict())
    loaded.load_state_dict(deepcopy(optimizer.state_dict()))
    for each in (optimizer, loaded):
        each.step()
    for found, expected in zip(other.parameters(), mixer.parameters(), strict=True):
        assert torch.equal(found, expected)
    for group in loaded.param_groups:
        group["lr"] = 0.0
    loaded.step()
    for found, expected in zip(other.parameters(), mixer.parameters(), strict=True):
        assert torch.equal(found, expected)


@needs_muon
def test_a_run_with_muon_resumes_in_the_same_bits(tmp_path):
    config = replace(CONFIG, optimizer="muon")
    expected, resumed = converted(), converted()
    distill(expected, samples(), config)

    class Killed(BaseException):
        pass

    def kill(step, terms):
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        distill(converted(), samples(), config, tmp_path, on_step=kill)
    kept = read_tensors(last_checkpoint(tmp_path) / "optimizer.safetensors")
    kinds = {key.rpartition("/")[2] for key in kept}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    distill(resumed, samples(), config, tmp_path, resume=True)
    for name, tensor in block_weights(expected).items():
        assert torch.equal(block_weights(resumed)[name], tensor), name


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_what_is_kept_is_what_a_plan_counts(kind):
    mixer = block()
    optimizer = make_optimizer(mixer.parameters(), replace(MUON, optimizer=kind))
    optimizer.step()
    kept = optimizer_tensors(optimizer, dict(mixer.named_parameters()))
    found = sum(tensor.numel() for key, tensor in kept.items() if not key.endswith("/step"))
    counted = sum(p.numel() * state_per_number(p, kind) for p in mixer.parameters())
    assert found == counted


def test_muon_names_the_pytorch_that_it_needs(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConvFusionError, match=r"muon needs PyTorch 2\.9 or newer"):
        check_optimizer("muon")
