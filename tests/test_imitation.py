"""Stage 1 of a distillation: each block alone imitates its attention on the teacher's inputs."""

from dataclasses import replace

import pytest
import torch
from tiny_models import PLAIN, randomise
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.data import LatentDataset
from convfusion.distill import DistillConfig, DistillTask, LossWeights, distill
from convfusion.families import family_of
from convfusion.surgery import mixers_of

table = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)


def task_and_inputs(case):
    from diffusers import DDIMScheduler

    model = case.model()
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    randomise(mixers_of(model))
    return DistillTask(model, DDIMScheduler()), case.batch(*case.sizes[0])


@table
def test_the_loss_is_that_of_blocks_on_the_teachers_inputs(case):
    """Written out with the inputs and outputs that stock attention has in the teacher."""
    task, inputs = task_and_inputs(case)
    seen = {}

    def keep(path):
        def hook(module, args, kwargs, output):
            seen[path] = (args[0] if args else kwargs["hidden_states"], output)

        return hook

    handles = [
        task.teacher.get_submodule(s.path).register_forward_hook(keep(s.path), with_kwargs=True)
        for s in task.sites
    ]
    with torch.no_grad():
        found = task.imitation(*inputs).terms["imitation"]
        for handle in handles:
            handle.remove()
        height, width = case.sizes[0]
        patch = family_of(task.student).patch_size(task.student)
        expected = []
        for site in task.sites:
            tokens, target = seen[site.path]
            factor = patch * 2**site.level
            grid = (-(-height // factor), -(-width // factor))
            mixed = mixers_of(task.student)[site.path](tokens, grid)
            expected += [
                (one - other).square().mean() / other.var()
                for one, other in zip(mixed, target, strict=True)
            ]
    torch.testing.assert_close(found, torch.stack(expected).mean())


@table
def test_each_block_has_a_gradient_that_no_other_block_changes(case):
    task, inputs = task_and_inputs(case)
    mixers = mixers_of(task.student)
    task.student.requires_grad_(False)
    for mixer in mixers.values():
        mixer.requires_grad_(True)
    task.imitation(*inputs).terms["imitation"].backward()
    first, *others = mixers
    gradients = [p.grad.clone() for p in mixers[first].parameters()]
    assert all(p.grad.abs().sum() > 0 for m in mixers.values() for p in m.parameters())
    with torch.no_grad():
        for path in others:
            for parameter in mixers[path].parameters():
                parameter.mul_(3)
    task.student.zero_grad()
    task.imitation(*inputs).terms["imitation"].backward()
    again = [p.grad for p in mixers[first].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_a_run_goes_from_the_first_stage_to_the_second(tmp_path):
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    data = LatentDataset(latents, ["red apple", "green apple", "red", ""])
    config = DistillConfig(
        steps=4, batch_size=2, imitation_steps=2, warmup=0, losses=LossWeights(noise=1.0)
    )
    seen = []
    distill(pipe, data, config, on_step=lambda step, terms: seen.append(sorted(terms)))
    assert seen == [["imitation"]] * 2 + [["distill", "feature", "noise"]] * 2
    with pytest.raises(ConvFusionError, match="imitation_steps must lie"):
        replace(config, imitation_steps=5)
