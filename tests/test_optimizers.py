"""The optimisers, and what is kept of them."""

import torch
from test_resume import CONFIG, converted

from convfusion.distill.optimizers import STATE_PER_NUMBER, make_optimizer
from convfusion.distill.state import optimizer_tensors
from convfusion.surgery import mixers_of


def test_what_is_kept_is_what_a_plan_counts():
    mixer = next(iter(mixers_of(converted()).values()))
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer = make_optimizer(mixer.parameters(), CONFIG)
    optimizer.step()
    kept = optimizer_tensors(optimizer, dict(mixer.named_parameters()))
    found = sum(tensor.numel() for key, tensor in kept.items() if not key.endswith("/step"))
    trained = sum(p.numel() for p in mixer.parameters())
    assert found == trained * STATE_PER_NUMBER[CONFIG.optimizer]
