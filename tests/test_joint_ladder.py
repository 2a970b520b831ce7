"""Large pictures of models that are flows: a rung starts late on the line to noise."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import (
    chroma_pipeline,
    flux_dev,
    lumina_image,
    qwen_image,
    stable_diffusion_3,
    z_image,
)

import convfusion
from convfusion.highres import Ladder, Start, highres

PIPELINES = {
    "sd3": stable_diffusion_3,
    "flux": flux_dev,
    "chroma": chroma_pipeline,
    "zimage": z_image,
    "qwenimage": qwen_image,
    "lumina2": lumina_image,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_ladder_climbs_by_the_steps_that_the_pipeline_sets(name, monkeypatch):
    """Some shift their noise by the size, and have packed latents."""
    pipe, told, seen = PIPELINES[name](), [], []
    monkeypatch.setattr("convfusion.highres.ladder.native_size", lambda _: (16, 16))
    convfusion.convert(pipe)
    whole = pipe.scheduler.step

    def step(output, timestep, latents, *args, **kwargs):
        seen.append((float(timestep), latents.float().std().item()))
        return whole(output, timestep, latents, *args, **kwargs)

    pipe.scheduler.step = step
    ladder = Ladder(factor=2, strength=0.5, guidance=1.0)
    size = (64, 48)
    [drawn] = highres(
        pipe, ["red"], size, steps=4, guidance=1.0, ladder=ladder,
        on_step=lambda *each: told.append(each),
    )  # fmt: skip
    assert drawn.size == (48, 64)
    rungs = told[0][1]
    assert rungs > 1
    assert told == [
        (rung, rungs, number, steps)
        for rung, steps in [(1, 4), *((rung, 2) for rung in range(2, rungs + 1))]
        for number in range(1, steps + 1)
    ]
    times = [time for time, _ in seen]
    assert times[:4] == sorted(times[:4], reverse=True)
    assert 0 < times[4] < times[0]  # a rung begins late
    assert pipe.scheduler.step is step


def test_a_rung_starts_on_the_line_from_picture_to_noise():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    clean, noise = torch.randn(2, 1, 4, 6, 8)
    start, timestep = Start(clean, noise, (3, 4)), scheduler.timesteps[5]
    expected = scheduler.scale_noise(clean, timestep[None], noise)
    torch.testing.assert_close(start.add_noise(scheduler, timestep), expected)
    assert torch.equal(start.add_noise(scheduler, None), clean)
