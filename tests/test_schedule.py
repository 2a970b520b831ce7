"""Schedules of diffusers, as this library reads them: diffusions and flows."""

import inspect

import diffusers
import pytest
import torch
from tiny_models import sd35, shapes_of

from convfusion.distill.losses import min_snr_weight, weigh_steps
from convfusion.errors import ConvFusionError
from convfusion.families import list_sites, native_latents, site_grid
from convfusion.schedule import Schedule, noise_schedule

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def schedule_of(name, **options):
    return noise_schedule(getattr(diffusers, name)(**options), shapes_of(sd35))


def test_velocity_and_learned_variance_become_epsilon():
    levels = torch.linspace(0.99, 0.01, 1000)
    steps = torch.tensor([10, 700])
    signal = levels[steps].view(-1, 1, 1, 1)
    clean, noise = torch.randn(2, 2, 4, 6, 6).unbind()
    schedule = Schedule("v_prediction", levels, torch.arange(1000))
    noisy = schedule.add_noise(clean, noise, steps)
    torch.testing.assert_close(noisy, signal.sqrt() * clean + (1 - signal).sqrt() * noise)
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    found = schedule.read_output(velocity, noisy, steps)
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-5)
    assert torch.equal(schedule.find_target(clean, noise), noise)
    schedule = Schedule("epsilon", levels, torch.arange(1000))
    with_variance = torch.cat([noise, torch.randn_like(noise)], dim=1)
    assert torch.equal(schedule.read_output(with_variance, noisy, steps), noise)
    assert torch.equal(schedule.tell(steps), steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
        ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ],
)
def test_a_flow_is_the_straight_way_and_its_velocity_leads_to_the_clean_latents(name, options):
    schedule = schedule_of(name, **options)
    assert schedule.is_flow
    times = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(schedule.levels, 3 * times / (1 + 2 * times))
    torch.testing.assert_close(schedule.timesteps, 1000 * schedule.levels)
    clean, noise = torch.randn(2, 3, 4, 2, 6, 6).unbind()
    steps = torch.tensor([0, 300, 999])
    noisy = schedule.add_noise(clean, noise, steps)
    torch.testing.assert_close(noisy[2], noise[2])  # the last step has noise alone
    velocity = schedule.read_output(schedule.find_target(clean, noise), noisy, steps)
    share = schedule.levels[steps].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - share * velocity, clean)


def test_a_perfect_flow_is_drawn_back_by_diffusers_own_solver():
    """Its velocity, and the timesteps that the denoiser is told, are what the solver means."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = noise_schedule(scheduler, shapes_of(sd35))
    clean, noise = torch.randn(2, 1, 4, 6, 6).unbind()
    scheduler.set_timesteps(4)
    latents = noise
    for t in scheduler.timesteps:
        place = (schedule.timesteps - t).abs().argmin()[None]
        expected = schedule.add_noise(clean, noise, place)
        torch.testing.assert_close(latents, expected, atol=5e-3, rtol=0)
        latents = scheduler.step(schedule.find_target(clean, noise), t, latents).prev_sample
    torch.testing.assert_close(latents, clean)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_that_of_the_models_own_size(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.9, max_shift=2.1,
        base_image_seq_len=16, max_image_seq_len=128,
    )  # fmt: skip
    model = shapes_of(sd35)
    height, width = site_grid(model, list_sites(model)[0], native_latents(model))
    assert (height, width) == (8, 8)
    moved = 0.9 + 1.2 * (64 - 16) / (128 - 16)
    scheduler.set_timesteps(1000, mu=moved)
    schedule = noise_schedule(scheduler, model)
    torch.testing.assert_close(schedule.levels, scheduler.sigmas[:-1].flip(0))


def test_drawing_that_ends_early_has_no_steps_below():
    schedule = schedule_of("FlowMatchEulerDiscreteScheduler", shift=2.0, shift_terminal=0.1)
    assert schedule.levels[0].item() == pytest.approx(0.1)
    assert schedule.levels[-1].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIMScheduler", {"prediction_type": "sample"}, "'sample' is not supported"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "runs from noise at 0"),
    ],
)
def test_other_schedules_are_refused(name, options, message):
    kind = getattr(diffusers, name)
    assert set(options) <= set(inspect.signature(kind.__init__).parameters)
    with pytest.raises(ConvFusionError, match=message):
        schedule_of(name, **options)


def test_steps_of_a_flow_weigh_alike():
    steps = torch.tensor([0, 500, 999])
    flow = schedule_of("FlowMatchEulerDiscreteScheduler", shift=3.0)
    assert torch.equal(weigh_steps(flow, steps, 5.0), torch.ones(3))
    diffusion = schedule_of("DDIMScheduler")
    assert torch.equal(
        weigh_steps(diffusion, steps, 5.0), min_snr_weight(diffusion.levels, steps, 5.0)
    )
    assert not diffusion.is_same(flow)
    assert diffusion.is_same(schedule_of("DDIMScheduler"))
    assert not flow.is_same(schedule_of("FlowMatchEulerDiscreteScheduler", shift=2.0))


def test_continuous_times_are_those_that_stable_video_diffusion_draws_at():
    """Noised latents, times and what an output stands for are those of the scheduler."""
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    schedule = noise_schedule(scheduler, None)
    scheduler.set_timesteps(len(schedule))
    torch.testing.assert_close(
        schedule.timesteps, scheduler.timesteps.flip(0), rtol=1e-4, atol=1e-4
    )
    clean, noise, output = torch.randn(3, 1, 4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    step, place = torch.tensor([700]), len(schedule) - 1 - 700
    time, sigma = scheduler.timesteps[place], scheduler.sigmas[place]
    theirs = scheduler.scale_model_input(clean + sigma * noise, time)
    ours = schedule.add_noise(clean, noise, step)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    drawn = scheduler.step(output, time, clean + sigma * noise).pred_original_sample
    read = clean + sigma * noise - sigma * schedule.read_output(output, ours, step)
    torch.testing.assert_close(read, drawn, rtol=1e-3, atol=1e-2)
