"""Large pictures: the ladder, the tiles of the VAE, and what keeps them within memory."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import CASES, JOINT, run
from tiny_pipelines import PIPELINES, autoencoder, dit_pipeline, pixart_sigma, stable_diffusion

import convfusion
from convfusion import ConvFusionError, DeltaConv, mini, uniform
from convfusion.bench.models import bench_model
from convfusion.evaluate import psnr
from convfusion.families import native_size
from convfusion.generate import generate
from convfusion.highres import Ladder, Start, highres, savings
from convfusion.highres.ladder import keep_last_steps, list_rungs, plan_ladder
from convfusion.highres.peaks import estimate_denoiser_peak
from convfusion.highres.vae_tiles import (
    VaeTiles,
    decode_in_tiles,
    encode_in_tiles,
    list_spans,
    tile_vae,
)

pytestmark = pytest.mark.libraries

BLOCKS = uniform(DeltaConv(kernel_size=3))
LARGE = ("sd", "sdxl", "pixart")
RECIPE = Path(__file__).parent.parent / "recipes" / "highres.py"


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and np.array_equal(np.array(first), np.array(second))


@settings(deadline=None)
@given(
    native=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    factor=st.floats(1.2, 4),
)
def test_rungs_grow_evenly_from_the_models_own_size(native, size, factor):
    native = (native[0] * 16, native[1] * 16)
    size = (size[0] * 16, size[1] * 16)
    sizes = list_rungs(native, size, factor, 16)
    assert sizes[-1] == size
    assert all(side % 16 == 0 and side >= 16 for rung in sizes for side in rung)
    for below, above in pairwise(sizes):
        for small, large in zip(
            below, above, strict=True
        ):  # each side was rounded to 16 once, up or down
            assert large - 8 <= factor**1.02 * (small + 8) + 8
            assert small <= large
    growth = math.sqrt(math.prod(size) / math.prod(native))
    if growth > 1.5 and min(sizes[0]) >= 64:  # the rounding is small then
        assert 0.7 < math.prod(sizes[0]) / math.prod(native) < 1.4


@pytest.mark.parametrize("kind", LARGE)
def test_one_rung_is_the_pipeline_itself(kind):
    pipe = PIPELINES[kind]()
    convfusion.convert(pipe, BLOCKS)
    size = native_size(pipe)
    expected = generate(pipe, ["red apple"], seeds=[4], steps=3, guidance=2.0, size=size)
    found = highres(pipe, ["red apple"], size, seeds=[4], steps=3, guidance=2.0)
    assert same(found[0], expected[0])


@pytest.mark.parametrize("kind", LARGE)
def test_a_ladder_draws_the_size_that_is_wanted(kind):
    pipe = PIPELINES[kind]()
    convfusion.convert(pipe, BLOCKS)
    scheduler, told = pipe.scheduler, []
    height, width = (2 * side for side in native_size(pipe))
    size = (height, width * 3 // 2)
    [drawn] = highres(
        pipe, ["red apple"], size, steps=3, guidance=2.0, ladder=Ladder(factor=3, strength=0.4),
        on_step=lambda *step: told.append(step),
    )  # fmt: skip
    assert drawn.size == (size[1], size[0])
    assert told == [(1, 2, 1, 3), (1, 2, 2, 3), (1, 2, 3, 3), (2, 2, 1, 1)]
    assert pipe.scheduler is scheduler
    assert not {"decode", "encode"} & pipe.vae.__dict__.keys()


@pytest.mark.parametrize(("guidance", "samples"), [(1.0, 1), (2.0, 2)])
def test_rungs_above_the_first_have_a_guidance_of_their_own(guidance, samples):
    pipe, seen = stable_diffusion(), []
    pipe.unet.register_forward_pre_hook(lambda unet, given: seen.append(given[0].shape))
    ladder = Ladder(strength=0.5, guidance=guidance)
    highres(pipe, ["red apple"], (32, 32), steps=4, guidance=2.0, ladder=ladder)
    assert [shape[0] for shape in seen] == [2] * 4 + [samples] * 2  # guidance takes two samples
    assert [shape[-1] for shape in seen] == [8] * 4 + [16] * 2
    means = plan_ladder(pipe, (32, 32), Ladder(guidance=guidance, memory=100), guidance=2.0).savings
    assert means.gib == pytest.approx(estimate_denoiser_peak(pipe, (16, 16), batch=samples))


def test_the_seed_decides():
    pipe = stable_diffusion()
    drawn = [
        highres(pipe, [prompt], (32, 32), steps=5, guidance=2.0, seeds=[seed])[0]
        for prompt, seed in (("red", 1), ("red", 1), ("red", 2), ("green", 1))
    ]
    assert same(drawn[0], drawn[1])
    assert not any(same(drawn[0], other) for other in drawn[2:])


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_a_rung_takes_the_last_steps_of_any_scheduler(kind):
    pipe = stable_diffusion()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(6)
    every = pipe.scheduler.timesteps
    with keep_last_steps(pipe, 6, 2) as scheduler:
        scheduler.set_timesteps(6)
        assert torch.equal(scheduler.timesteps, every[4 * scheduler.order :])
        noise = torch.randn(1, 4, 8, 8)
        noisy = scheduler.add_noise(torch.zeros_like(noise), noise, scheduler.timesteps[:1])
        assert torch.equal(noisy.sign(), noise.sign())
    image = highres(pipe, ["red"], (32, 32), steps=6, guidance=2.0, ladder=Ladder(strength=0.34))
    assert image[0].size == (32, 32)


def test_a_rung_keeps_more_of_the_picture_with_less_strength_and_kept_frequencies():
    pipe, drawing = mini.load_student(), {"steps": 5, "guidance": 3.0, "seeds": [3]}
    small = highres(pipe, ["red apple, noto"], (64, 64), **drawing)[0]

    def alike(strength, keep):
        ladder = Ladder(strength=strength, keep=keep)
        large = highres(pipe, ["red apple, noto"], (128, 128), ladder=ladder, **drawing)[0]
        return psnr(large.resize((64, 64), Image.Resampling.BOX), small)

    little, much, kept = alike(0.2, False), alike(1.0, False), alike(1.0, True)
    assert little > much + 4
    assert kept > much + 4


@given(
    below=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
@settings(deadline=None, max_examples=30)
def test_the_low_frequencies_are_those_of_the_start(below, more):
    size = (below[0] + more[0], below[1] + more[1])
    latents, noisy = torch.randn(2, 1, 4, *size)
    start = Start(noisy, noisy, below)
    assert torch.allclose(start.keep_layout(latents, latents), latents)
    shifted = start.keep_layout(latents, latents + 3)  # a constant is as low as a frequency can be
    assert torch.allclose(shifted, latents + 3, atol=1e-5)
    if size == below:
        assert torch.allclose(start.keep_layout(latents, noisy), noisy, atol=1e-5)


def deep_vae(**options) -> AutoencoderKL:
    """Eight pixels per latent along a side, with values that matter."""
    torch.manual_seed(5)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        **options,
    ).eval()


@settings(deadline=None)
@given(length=st.integers(1, 300), side=st.integers(1, 70), margin=st.integers(0, 20))
def test_tiles_cover_a_side_once(length, side, margin):
    found = list_spans(length, VaeTiles(side=side, margin=margin, fade=0))
    cores = [i for span in found for i in range(*span.core)]
    assert cores == list(range(length))
    for span in found:
        assert 0 <= span.window[0] <= span.core[0] < span.core[1] <= span.window[1] <= length
        assert span.core[0] - span.window[0] in (margin, span.core[0])


@torch.no_grad()
def test_exact_tiles_equal_one_piece():
    """Every norm in turn, odd sizes, cores that differ: only rounding is left."""
    vae = deep_vae(mid_block_add_attention=False)
    tiles = VaeTiles(side=14, margin=13, fade=2, exact=True)
    latents = torch.randn(2, 4, 31, 17)
    whole = vae.decode(latents).sample
    assert (decode_in_tiles(vae, latents, tiles) - whole).abs().max() < 2e-4 * whole.abs().max()
    pictures = torch.rand(1, 3, 31 * 4, 17 * 4) * 2 - 1
    moments = vae.encode(pictures).latent_dist.parameters
    assert (
        encode_in_tiles(vae, pictures, tiles) - moments
    ).abs().max() < 2e-4 * moments.abs().max()
    alone = VaeTiles(side=14, margin=0, fade=0, exact=True)  # the test can fail
    assert (decode_in_tiles(vae, latents, alone) - whole).abs().max() > 1e-2 * whole.abs().max()


@torch.no_grad()
def test_tiles_leave_no_seams():
    """Steps across the borders of tiles are those of the picture in one piece."""
    vae = deep_vae()
    latents = torch.nn.functional.interpolate(
        torch.randn(1, 4, 4, 5), size=(32, 40), mode="bicubic"
    )
    whole = vae.decode(latents).sample

    def worst_step(pictures):
        steps = (pictures - whole).diff(dim=-1).abs()
        return steps.max() / whole.diff(dim=-1).abs().max()

    tiled = decode_in_tiles(vae, latents, VaeTiles(side=12, margin=10, fade=2))
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 64
    vae.enable_tiling()
    stock = vae.decode(latents).sample
    assert worst_step(tiled) < 0.3 * worst_step(stock)


def test_values_that_overflow_are_an_error():
    vae = autoencoder()
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(float("inf"))
    for tiles in (None, VaeTiles(side=4, margin=2, fade=1)):
        with tile_vae(vae, tiles), pytest.raises(ConvFusionError, match="not finite"):
            vae.decode(torch.randn(1, 4, 8, 8))


def test_a_vae_that_overflows_in_float16_is_run_in_float32():
    pipe = stable_diffusion()
    with torch.no_grad():  # values beyond float16, which the norm behind them brings back
        pipe.vae.decoder.conv_in.bias.fill_(6e4)
        pipe.vae.decoder.mid_block.resnets[0].conv2.bias.fill_(6e4)
    pipe.to(torch.float16)
    alone = generate(pipe, ["red"], steps=3, guidance=1.0)[0]
    assert np.array(alone).max() == 0  # what the pipeline makes of it
    large = highres(pipe, ["red"], (32, 32), steps=3, guidance=1.0)[0]
    assert np.array(large).std() > 1
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("case", [CASES[0], CASES[3], *JOINT], ids=lambda case: case.name)
@torch.no_grad()
def test_savings_that_save_memory_change_nothing(case, monkeypatch):
    monkeypatch.setattr(savings, "CHUNK", 7)  # which divides no number of words
    model = case.model()
    convfusion.convert(model, case.preset if case.joint else BLOCKS)
    height, width = case.sizes[0]
    expected = run(model, case, height, width)
    with savings.chunk_feed_forward(model, (height, width)), savings.run_one_at_a_time(model):
        found = run(model, case, height, width)
    assert torch.allclose(found, expected, atol=1e-5)
    assert "forward" not in model.__dict__
    assert torch.equal(run(model, case, height, width), expected)


def test_chunks_of_tokens_beside_a_text_save_memory():
    model = bench_model("sd3-medium").denoiser
    whole = estimate_denoiser_peak(model, (256, 256), batch=1)
    with savings.chunk_feed_forward(model, (256, 256)):
        assert estimate_denoiser_peak(model, (256, 256), batch=1) < 0.65 * whole
    kinds = {type(block.ff).__name__ for block in model.transformer_blocks}
    assert kinds == {"FeedForward"}


def test_a_bound_on_memory_takes_the_means_that_are_enough():
    pipe = stable_diffusion()
    convfusion.convert(pipe, BLOCKS)
    size = tuple(16 * side for side in native_size(pipe))
    free = plan_ladder(pipe, size, Ladder(memory=100)).savings
    assert not free.chunks and not free.one_at_a_time and free.tiles is None
    tight = plan_ladder(pipe, size, Ladder(memory=0.6 * free.gib)).savings
    assert tight.gib <= 0.6 * free.gib
    assert tight.chunks or tight.tiles


def test_a_picture_beyond_the_memory_is_refused_with_one_that_fits():
    pipe = pixart_sigma()
    convfusion.convert(pipe, BLOCKS)
    size, memory = tuple(16 * side for side in native_size(pipe)), 0.002
    with pytest.raises(ConvFusionError, match="GiB of activations") as refused:
        plan_ladder(pipe, size, Ladder(memory=memory))
    width, height = map(int, str(refused.value).split()[-1].split("×"))
    assert height < size[0] and plan_ladder(pipe, (height, width), Ladder(memory=memory))


def test_estimates_that_the_page_tells():
    """docs/highres.md: SD1.5's UNet without its attention, one sample at 4096×4096 pixels."""
    model = bench_model("sd15").denoiser
    convfusion.convert(model, "sd15")
    convfusion.drop_attention(model)
    latents = (512, 512)
    assert round(estimate_denoiser_peak(model, latents, batch=1), 2) == 8.13
    with savings.chunk_feed_forward(model, latents):
        assert round(estimate_denoiser_peak(model, latents, batch=1), 2) == 4.38


@pytest.mark.parametrize("part", ["forward", "site"])
def test_the_estimate_is_near_what_is_measured(part):
    """In a process of its own: the kernel's high-water mark, what was held before taken off."""
    command = [sys.executable, RECIPE, part, "--model", "small", "--side", "1024", "--here"]
    ran = subprocess.run(
        [*command, "--dtype", "float32"],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert ran.returncode == 0, ran.stderr
    row = json.loads(ran.stdout)
    assert 0.9 < row["measured_gib"] / row["estimated_gib"] < 1.5


def test_mistakes_are_told_before_anything_is_drawn(monkeypatch):
    pipe = stable_diffusion()
    monkeypatch.setattr(type(pipe), "__call__", lambda *_: pytest.fail("drawn"))
    for size, near in (((100, 90), "88×96"), ((-8, 40), "40×8"), ((0, 0), "8×8"), ((3, 7), "8×8")):
        with pytest.raises(ConvFusionError, match=f"multiples of 8; the nearest size is {near}"):
            highres(pipe, ["red"], size)
    with pytest.raises(ConvFusionError, match="at least 2 steps"):
        highres(pipe, ["red"], (32, 32), steps=1)
    with pytest.raises(ConvFusionError, match="1 prompts and 2 seeds"):
        highres(pipe, ["red"], (32, 32), seeds=[1, 2])
    with pytest.raises(ConvFusionError, match="no ladder"):
        highres(dit_pipeline(), ["red"], (32, 32))
    pipe.vae.enable_slicing()
    with pytest.raises(ConvFusionError, match="own tiling and slicing"):
        highres(pipe, ["red"], (256, 256))  # 128 latents along a side
    for wrong in (
        {"factor": 1.0},
        {"strength": 0.0},
        {"strength": 1.5},
        {"guidance": 0.5},
        {"memory": -1.0},
    ):
        with pytest.raises(ConvFusionError, match=next(iter(wrong))):
            Ladder(**wrong)
    with pytest.raises(ConvFusionError, match="fade"):
        VaeTiles(side=4, fade=3)
