"""Tiny pipelines of FLUX.1 and Chroma from end to end, whose latents come packed."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from evaluations import thumbnails
from PIL import Image
from tiny_models import CASES, shapes_of
from tiny_pipelines import chroma_pipeline, flux_dev, flux_kontext, stable_diffusion_3

import convfusion
from convfusion import ConvFusionError, uniform
from convfusion.analysis import AnalysisConfig, analyze
from convfusion.data import LatentDataset, build_cache
from convfusion.data.sources import Drawing, Prompts
from convfusion.distill import DistillConfig, distill
from convfusion.evaluate import epsilon_error, evaluate, plan_evaluation
from convfusion.families import arrange_call, encode_conditioning, family_of, flux
from convfusion.families.flux import FLUX_1, GUIDANCE
from convfusion.generate import generate
from convfusion.highres import Ladder, highres
from convfusion.mixers import Halo
from convfusion.surgery import attention_teacher

WHOLE = uniform(Halo(8, 16, 8, 1.0, 1.0))  # its window is larger than the grids
SMALL = uniform(Halo(2, 2, 2, 1.0, 1.0))
REFERENCE = Image.fromarray((np.indices((16, 24)).sum(0) * 6).astype(np.uint8)).convert("RGB")
PIPELINES = {
    "flux": (flux_dev, {}),
    "chroma": (chroma_pipeline, {}),
    "kontext": (
        flux_kontext,
        {"image": REFERENCE, "max_area": 16 * 32, "_auto_resize": False},
    ),
}
table = pytest.mark.parametrize("name", PIPELINES)
captioned = pytest.mark.parametrize("make", [flux_dev, chroma_pipeline])


def make_pictures(folder):
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(("red", "green apple")[number % 2])
    return folder


@table
def test_with_a_window_over_the_grid_it_draws_what_the_stock_pipeline_draws(name):
    make, options = PIPELINES[name]
    pipe = make()
    drawn = {}
    for state in ("stock", "whole", "small", "reverted"):
        if state == "reverted":
            convfusion.revert(pipe)
        elif state != "stock":
            convfusion.convert(pipe, {"whole": WHOLE, "small": SMALL}[state])
        (picture,) = generate(
            pipe, ["red apple"], steps=2, guidance=3.0, size=(16, 32), output_type="np", **options
        )
        drawn[state] = torch.as_tensor(np.asarray(picture))
        if state == "whole":
            convfusion.revert(pipe)
    torch.testing.assert_close(drawn["whole"], drawn["stock"], rtol=0, atol=1e-5)
    assert (drawn["small"] - drawn["stock"]).abs().max() > 1e-4
    assert torch.equal(drawn["reverted"], drawn["stock"])


@captioned
def test_the_denoiser_is_called_as_the_pipeline_calls_it(make):
    pipe, seen = make(), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    generate(pipe, ["red apple"], steps=1, guidance=GUIDANCE, size=(16, 24))
    handle.remove()
    called, family = seen[0], family_of(pipe.transformer)
    told = encode_conditioning(pipe, ["red apple"], (16, 24))
    latents = family.unpack_latents(pipe.transformer, called["hidden_states"], (8, 12))
    arranged = family.arrange_inputs(pipe.transformer, latents, torch.tensor([1000.0]), told)
    for name, tensor in arranged.items():
        torch.testing.assert_close(tensor, called[name], rtol=0, atol=0, msg=name)
    if family is FLUX_1:
        assert set(told) == {"encoder_hidden_states", "pooled_projections", "guidance"}
        assert inspect.signature(FluxPipeline.__call__).parameters["guidance_scale"].default == 3.5
        pipe.transformer.register_to_config(guidance_embeds=False)  # as schnell
        assert "guidance" not in encode_conditioning(pipe, ["red apple"], (16, 24))


@captioned
def test_pictures_are_cached_and_trained_on(make, tmp_path):
    pipe = make()
    convfusion.convert(pipe, SMALL)
    cache = build_cache(
        pipe, make_pictures(tmp_path / "pictures"), tmp_path / "cache", size=(16, 16)
    )
    assert cache.take([0], [False])[0].shape == (1, 4, 8, 8)
    frozen = {n: p.clone() for n, p in pipe.transformer.named_parameters() if ".mixer." not in n}
    blocks = {n: p.clone() for n, p in pipe.transformer.named_parameters() if ".mixer." in n}
    config = DistillConfig(
        steps=2, imitation_steps=1, batch_size=2, held_out=1, learning_rate=1e-2, warmup=0
    )
    result = distill(pipe, cache, config)
    assert result.epsilon_error > 0
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, (frozen | blocks)[name]) == (name in frozen), name


def test_what_is_drawn_is_cached_and_measured_in_the_shape_of_pictures(tmp_path):
    pipe, size = flux_dev(), (16, 24)
    prompts = Prompts("list", ("red", "green apple"), Drawing(steps=1, guidance=1.0))
    cache = build_cache(pipe, prompts, tmp_path / "cache", size=size)
    latents = cache.take([0], [False])[0]
    assert latents.shape == (1, 4, 8, 12)
    pictures = generate(pipe, ["red"], steps=1, guidance=1.0, size=size, output_type="np")
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + 0.1).sample
    drawn = pipe.image_processor.postprocess(decoded.detach(), "np")
    np.testing.assert_allclose(drawn[0], pictures[0], atol=1e-4)
    convfusion.convert(pipe, SMALL)
    settings = plan_evaluation(["red", "green"], 2, 5, steps=1, size=size, timesteps=(500,))
    found = evaluate(pipe, settings, tmp_path / "out", extractor=thumbnails())
    assert found is not None


@captioned
def test_what_its_pictures_look_at_is_analysed(make):
    """Though the model is told other times than the scheduler's."""
    found = analyze(make(), ["red"], AnalysisConfig(steps=2, size=(16, 24), filters=()))
    assert [site.grid for site in found.sites] == [(4, 6)] * 3
    assert all(0 < site.text.share < 1 for site in found.sites)
    assert len(found.timesteps) == 2


@pytest.mark.parametrize("make", [flux_dev, chroma_pipeline, stable_diffusion_3])
def test_a_ladder_goes_on_along_the_flow(make, monkeypatch):
    """A rung starts from the picture below with the noise of the first step that it takes."""
    pipe, starts = make(), []
    monkeypatch.setattr(flux, "NATIVE_LATENTS", (8, 8))
    step = type(pipe.scheduler).step

    def see(scheduler, output, timestep, sample, **options):
        result = step(scheduler, output, timestep, sample, **options)
        sigma = scheduler.sigmas[scheduler.step_index - 1]
        starts.append((float(timestep) / 1000, float(sigma), sample.std()))
        return result

    monkeypatch.setattr(type(pipe.scheduler), "step", see)
    ladder = Ladder(strength=0.5, factor=3.0)
    (picture,) = highres(pipe, ["red"], (32, 48), steps=4, guidance=1.0, ladder=ladder)
    assert picture.size == (48, 32)
    assert len(starts) == 4 + 2
    assert all(time == pytest.approx(sigma) for time, sigma, _ in starts)
    assert starts[0][0] == 1 and 0.2 < starts[4][0] < 0.9 and starts[5][0] < starts[4][0]


@captioned
def test_the_error_is_that_of_the_velocity(make):
    pipe = make()
    convfusion.convert(pipe, SMALL)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    data = LatentDataset(latents, ["red", ""])
    teacher = attention_teacher(pipe.transformer)
    error = epsilon_error(pipe, teacher, data.latents, data.captions, timesteps=[499])
    assert 0 < error < 1


def test_a_model_that_takes_more_than_its_latents_is_not_trained():
    """As FLUX.1 Fill, which is given a picture and a mask among the channels."""
    pipe = flux_dev()
    pipe.transformer.register_to_config(in_channels=32)
    with pytest.raises(ConvFusionError, match="takes 8 channels, and its latents have 4: a pict"):
        encode_conditioning(pipe, ["red"], (16, 16))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("flux", "chroma", "prx")])
def test_times_are_told_from_0_to_1(case):
    latents, _, _, told = case.batch(8, 12)
    called = arrange_call(shapes_of(case.make), latents, torch.tensor([250.0, 1000.0]), told)
    assert called["timestep"].tolist() == [0.25, 1.0]
