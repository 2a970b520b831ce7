"""Distillation of a video model: a tiny Wan pipeline, whose latents are a flow's."""

from dataclasses import replace

import pytest
import torch
from tiny_models import randomise
from tiny_pipelines import block_weights, wan

import convfusion
from convfusion import DeltaConv, Halo, uniform
from convfusion.data import LatentDataset
from convfusion.data.latents import prepare_data
from convfusion.distill import DistillConfig, DistillTask, LossWeights, distill
from convfusion.distill.curve import replacement_curve
from convfusion.distill.partial import site_costs
from convfusion.evaluate import epsilon_error
from convfusion.families import encode_conditioning
from convfusion.surgery import attention_teacher, mixers_of

VIDEO = DeltaConv(kernel_size=3, frame_kernel_size=3, first_frame_branch=True)
NEAR = Halo(block=(1, 2, 2), window=(1, 2, 2), cells=(1, 1, 1))  # it sees a frame
MIXERS = pytest.mark.parametrize("mixer", [VIDEO, NEAR], ids=lambda m: type(m).__name__)
TERMS = {
    "distill": LossWeights(distill=1, noise=0, feature=0),
    "noise": LossWeights(distill=0, noise=1, feature=0),
    "feature": LossWeights(distill=0, noise=0, feature=1),
}
CONFIG = DistillConfig(
    steps=4,
    imitation_steps=2,
    batch_size=2,
    held_out=1,
    warmup=0,
    learning_rate=1e-2,
    losses=LossWeights(noise=0.5),
    save_every=2,
)


def data(samples=5, shape=(4, 3, 4, 4)):
    latents = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(5))
    return LatentDataset(latents, [("red apple", "green", "")[i % 3] for i in range(samples)])


def converted(mixer=VIDEO, spread=None):
    pipe = wan()
    convfusion.convert(pipe, uniform(mixer))
    if spread:
        randomise(mixers_of(pipe), spread)
    return pipe


def batch(pipe):
    """Arguments of a task for a batch of two."""
    latents, told = prepare_data(pipe, data()).take([0, 1], [False, True])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))
    return latents, noise, torch.tensor([200, 900]), told


def test_captions_are_read_as_the_pipeline_reads_them():
    pipe = wan()
    told = encode_conditioning(pipe, ["red apple", ""], (16, 16))
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_frames": 5, "output_type": "latent"}
    pipe(["red apple", ""], num_inference_steps=1, guidance_scale=1.0, **size)
    handle.remove()
    assert told["encoder_hidden_states"].shape == (2, 512, 12)
    assert torch.equal(told["encoder_hidden_states"], seen[0])
    assert not told["encoder_hidden_states"][:, 3:].any()  # two words and the end


@MIXERS
@pytest.mark.parametrize("term", [*TERMS, "imitation"])
def test_every_term_alone_reaches_every_tensor_of_every_block(mixer, term):
    pipe = converted(mixer)  # as a user has it: freshly initialised
    task = DistillTask(pipe.transformer, pipe.scheduler, TERMS.get(term, LossWeights()))
    pipe.transformer.requires_grad_(False)
    for each in mixers_of(pipe).values():
        each.requires_grad_(True)
    terms = task(*batch(pipe), alone=term == "imitation").terms
    assert list(terms) == [term]
    terms[term].backward()
    for path, each in mixers_of(pipe).items():
        for name, parameter in each.named_parameters():
            assert parameter.grad is not None, (path, name)
            assert parameter.grad.abs().max() > 0, (path, name)
    others = (p for n, p in pipe.transformer.named_parameters() if ".mixer." not in n)
    assert all(parameter.grad is None for parameter in others)


def test_the_losses_are_those_of_velocities_at_the_schedulers_times():
    """Written out: σ by the shift of 3, 1000·σ told to the model, all weights 1."""
    pipe = converted(spread=0.1)
    latents, noise, steps, told = batch(pipe)
    task = DistillTask(pipe.transformer, pipe.scheduler, LossWeights(noise=1.0, feature=0))
    times = (steps + 1) / 1000
    sigmas = (3 * times / (1 + 2 * times)).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigmas) * latents + sigmas * noise
    with torch.no_grad():
        found = task(latents, noise, steps, told).terms
        learned, taught = (
            model(noisy, timestep=1000 * sigmas.flatten(), return_dict=False, **told)[0]
            for model in (pipe.transformer, attention_teacher(pipe.transformer))
        )
    torch.testing.assert_close(found["distill"], (learned - taught).square().mean())
    torch.testing.assert_close(found["noise"], (learned - (noise - latents)).square().mean())


@MIXERS
def test_only_the_blocks_move_and_a_run_goes_on_as_if_it_had_not_stopped(mixer, tmp_path):
    pipe, seen = converted(mixer), []
    before = {
        name: tensor.clone()
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae)
        for name, tensor in part.state_dict().items()
        if ".mixer." not in name
    }
    blocks = block_weights(pipe)
    result = distill(
        pipe, data(), CONFIG, tmp_path / "whole", on_step=lambda _, terms: seen.append(set(terms))
    )
    assert seen == [{"imitation"}] * 2 + [{"distill", "noise", "feature"}] * 2
    assert result.epsilon_error is not None and 0 < result.epsilon_error < 10
    trained = block_weights(pipe)
    assert not any(torch.equal(trained[name], tensor) for name, tensor in blocks.items())
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        for name, tensor in part.state_dict().items():
            assert ".mixer." in name or torch.equal(tensor, before[name]), name

    first = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        distill(converted(mixer), data(), CONFIG, first, on_step=stop_after(3))
    again = converted(mixer)
    distill(again, data(), CONFIG, first, resume=True)
    assert all(torch.equal(trained[name], t) for name, t in block_weights(again).items())
    loaded = wan()
    convfusion.load(loaded, first)
    assert all(torch.equal(trained[name], t) for name, t in block_weights(loaded).items())


def stop_after(last):
    def stop(step, terms):
        if step == last:
            raise KeyboardInterrupt

    return stop


def test_the_error_of_a_flow_is_that_of_its_velocity():
    pipe = converted(spread=0.1)
    teacher = attention_teacher(pipe.transformer)
    latents = data().latents[:2]
    error = epsilon_error(pipe, teacher, latents, ["red", ""], timesteps=[499])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(123_456))
    sigma = 0.75  # of 3·½/(1 + 2·½)
    noisy = (1 - sigma) * latents + sigma * noise
    told = encode_conditioning(pipe, ["red", ""], (16, 16))
    with torch.no_grad():
        learned, taught = (
            model(noisy, timestep=torch.full((2,), 750.0), return_dict=False, **told)[0].double()
            for model in (pipe.transformer, teacher)
        )
    by_hand = (learned - taught).square().sum((1, 2, 3, 4)) / taught.square().sum((1, 2, 3, 4))
    assert error == pytest.approx(by_hand.mean().item(), rel=1e-4)
    assert epsilon_error(pipe, pipe.transformer, latents, ["red", ""]) == 0


def test_sites_are_ranked_and_their_curve_is_measured():
    pipe = converted()
    whole = data()
    apart = LatentDataset(whole.latents[3:], whole.captions[3:])
    training = replace(CONFIG, steps=1, imitation_steps=0, held_out=0)
    costs = site_costs(pipe, LatentDataset(whole.latents[:3], whole.captions[:3]), apart, training)
    assert [site.path for site in costs.sites] == ["blocks.0.attn1", "blocks.1.attn1"]
    curve = replacement_curve(pipe, apart, costs)
    assert curve.latents == (3, 4, 4)
    assert curve.by_epsilon[0].epsilon_error == pytest.approx(
        min(site.epsilon_error for site in costs.sites)
    )
    assert curve.by_epsilon[0].epsilon_error > 0
    assert curve.by_epsilon[0].flops_gone != 0
