"""Tiny pipelines of Z-Image, Qwen-Image and Lumina 2 from end to end."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import block_weights, lumina_image, qwen_image, z_image

import convfusion
from convfusion import Removed, uniform
from convfusion.analysis import AnalysisConfig, HighPass, ablate, analyze
from convfusion.budget.measure import measure_moments
from convfusion.data import build_cache
from convfusion.data.sources import Drawing, Prompts
from convfusion.distill import DistillConfig, distill
from convfusion.families import arrange_call, encode_conditioning, family_of, list_sites
from convfusion.generate import generate
from convfusion.highres.savings import run_one_at_a_time
from convfusion.mixers import Depthwise, Halo, Shared
from convfusion.recording import record_calls
from convfusion.surgery.start import start_from_attention

SIZE = (32, 48)
LATENTS = {"zimage": (16, 24), "qwenimage": (16, 24), "lumina2": (4, 6)}
MAKE = {"zimage": z_image, "qwenimage": qwen_image, "lumina2": lumina_image}
CAPTIONS = ["red apple", "green"]
WHOLE = uniform(Halo(4, 12, 2, 1.0, 1.0))


@pytest.fixture(params=MAKE)
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    made = MAKE[name]()
    made.set_progress_bar_config(disable=True)
    return made


def test_it_draws_as_before_with_a_window_over_the_grid(pipe):
    def draw():
        drawn = generate(pipe, CAPTIONS, steps=2, guidance=3.0, size=SIZE, output_type="np")
        return np.stack(drawn)

    stock = draw()
    convfusion.convert(pipe, WHOLE)
    np.testing.assert_allclose(draw(), stock, atol=1e-5)
    convfusion.revert(pipe)
    assert np.array_equal(draw(), stock)


def test_the_denoiser_is_called_as_the_pipeline_calls_it(name, pipe):
    denoiser, seen = pipe.transformer, []
    signature = inspect.signature(type(denoiser).forward)

    def keep(module, args, kwargs):
        seen.append(signature.bind(module, *args, **kwargs).arguments)

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    steps = pipe.scheduler.config.num_train_timesteps
    generate(pipe, CAPTIONS, steps=1, guidance=1.0, size=SIZE)
    handle.remove()
    family, (called,) = family_of(denoiser), seen
    told = encode_conditioning(pipe, CAPTIONS, SIZE)
    latents = family.unpack_latents(denoiser, called[family.latents], LATENTS[name])
    times = torch.full((2,), float(steps))  # of noise alone
    ours = arrange_call(denoiser, latents, times, told)
    for key in ours.keys() - {"return_dict", family.latents}:
        torch.testing.assert_close(ours[key], called[key], check_dtype=False, msg=key)
    packed = (torch.stack(list(each[family.latents])) for each in (ours, called))
    assert torch.equal(*packed)
    assert latents.shape == (2, 4, *LATENTS[name])


def test_pictures_and_prompts_are_cached_and_distilled(pipe, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % 2])
    convfusion.convert(pipe, uniform(Halo(2, 2, 1, 1.0, 1.0)))
    blocks = block_weights(pipe)
    frozen = {k: v.clone() for k, v in pipe.transformer.named_parameters() if ".mixer." not in k}
    cache = build_cache(pipe, folder, tmp_path / "cache", size=SIZE)
    config = DistillConfig(steps=2, imitation_steps=1, batch_size=2, held_out=1, warmup=0)
    result = distill(pipe, cache, config)
    assert 0 < result.epsilon_error < 10
    trained = block_weights(pipe)
    assert not any(torch.equal(blocks[key], trained[key]) for key in blocks)
    now = dict(pipe.transformer.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())


def test_its_own_pictures_are_cached(name, pipe, tmp_path):
    prompts = Prompts("list", tuple(CAPTIONS), Drawing(steps=1, guidance=1.0))
    cache = build_cache(pipe, prompts, tmp_path / "cache", size=SIZE)
    latents, told = cache.take([0, 1], [False, False])
    assert latents.shape == (2, 4, *LATENTS[name])
    assert told.keys() == encode_conditioning(pipe, CAPTIONS, SIZE).keys()


def test_guidance_has_the_same_name_for_every_pipeline(name, pipe):
    """Above 1 the denoiser is called without the prompt too."""
    calls, family = [], family_of(pipe.transformer)

    def count(module, args, kwargs):
        calls.append(len(args[0] if args else kwargs[family.latents]))

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pictures = {}
    for guidance in (0.0, 1.0, 5.0):
        calls.clear()
        generate(pipe, ["red"], steps=1, guidance=guidance, size=SIZE, output_type="np")
        pictures[guidance] = sum(calls)
    assert pictures == {0.0: 1, 1.0: 1, 5.0: 2}


def test_samples_are_worked_on_one_by_one(pipe):
    """To save memory, with captions of several lengths and both halves of a guided batch."""

    def draw():
        drawn = generate(pipe, CAPTIONS, steps=1, guidance=3.0, size=SIZE, output_type="np")
        return np.stack(drawn)

    together = draw()
    with run_one_at_a_time(pipe.transformer):
        np.testing.assert_allclose(draw(), together, atol=1e-5)


def test_it_is_analysed_at_the_times_that_it_draws_at(pipe):
    settings = AnalysisConfig(steps=2, guidance=1.0, size=SIZE, filters=(HighPass(0.5, 1),))
    found = analyze(pipe, CAPTIONS, settings)
    assert [site.path for site in found.sites] == [s.path for s in list_sites(pipe.transformer)]
    assert len(found.timesteps) == 2
    tried = {"removed": uniform(Removed())}
    drawn = ablate(pipe, CAPTIONS[:1], tried, steps=2, guidance=1.0, size=SIZE)
    assert drawn["removed"].epsilon_error > 0


def test_recorded_calls_measure_a_budget_and_start_blocks(name, pipe):
    calls = record_calls(pipe, CAPTIONS, looks=1, steps=2, guidance=3.0, size=SIZE)
    moments = measure_moments(pipe, calls)
    assert moments.latents == LATENTS[name]
    convfusion.convert(pipe, uniform(Shared(Depthwise(kernel_size=3))))
    errors = start_from_attention(pipe, calls)
    assert set(errors) == {site.path for site in list_sites(pipe.transformer)}
