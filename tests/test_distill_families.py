"""A step of a distillation of every family, in both stages: what it reaches and what it moves."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import CASES, DISTILLED, Case, shapes_of
from torch import nn

import convfusion
from convfusion import ConvFusionError
from convfusion.distill import DistillTask, LossWeights
from convfusion.families import arrange_call, family_of
from convfusion.surgery import mixers_of

table = pytest.mark.parametrize("case", DISTILLED, ids=lambda case: case.name)


def make_task(case: Case) -> DistillTask:
    """Student and teacher as a user has them, with blocks freshly initialised."""
    model = case.model()
    convfusion.convert(model)
    model.requires_grad_(False)
    for mixer in mixers_of(model).values():
        mixer.requires_grad_(True)
    scheduler = FlowMatchEulerDiscreteScheduler() if case.flow else DDIMScheduler()
    return DistillTask(model, scheduler, LossWeights(distill=1, noise=1, feature=1))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.mixer.{name}": parameter
        for path, mixer in mixers_of(model).items()
        for name, parameter in mixer.named_parameters()
    }


@table
def test_a_step_reaches_every_tensor_of_every_block_and_moves_nothing_else(case):
    task = make_task(case)
    model, trained = task.student, trained_parameters(task.student)
    batch = case.batch(*case.sizes[0])
    terms = {**task(*batch).terms, **task(*batch, alone=True).terms}
    assert set(terms) == {"distill", "noise", "feature", "imitation"}
    for name, term in terms.items():
        assert term.isfinite(), name
        options = {"retain_graph": True, "allow_unused": True}
        gradients = torch.autograd.grad(term, list(trained.values()), **options)
        for parameter, gradient in zip(trained, gradients, strict=True):
            assert gradient is not None, (name, parameter)
            assert gradient.abs().max() > 0, (name, parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.stack(list(terms.values())).sum().backward()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@table
def test_latents_come_back_from_a_models_own_layout(case):
    model, (latents, *_, told) = shapes_of(case.make), case.batch(*case.sizes[0])
    family = family_of(model)
    called = arrange_call(model, latents, torch.tensor([300, 600]), told)
    own = case.inputs(*case.sizes[0])
    assert set(called) == set(own)
    packed, sides = called[family.latents], tuple(latents.shape[2:])
    assert torch.equal(packed, own[family.latents])
    assert torch.equal(family.unpack_latents(model, packed, sides), latents)


def test_a_controlnet_is_refused_since_it_predicts_no_noise():
    (case,) = (case for case in CASES if not case.distils)
    model = case.model()
    convfusion.convert(model)
    with pytest.raises(ConvFusionError, match="neither noise nor a velocity, but maps"):
        DistillTask(model, DDIMScheduler())
