"""Distillation from latents and prompts, with the pipelines of further families."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2
from tiny_models import CASES, shapes_of
from tiny_pipelines import (
    animate_diff,
    autoencoder,
    block_weights,
    hunyuan_dit,
    latte_pipeline,
    ltx_video,
    skyreels_v2,
    text_to_video,
)

import convfusion
from convfusion import ConvFusionError
from convfusion.data import LatentDataset, build_cache
from convfusion.data.clip_folders import ClipFolder
from convfusion.data.extents import choose_sizes
from convfusion.data.pictures import encode_pictures
from convfusion.data.sources import Drawing, Prompts
from convfusion.distill import DistillConfig, LossWeights, distill
from convfusion.families import (
    arrange_call,
    check_captioned,
    denoiser_of,
    encode_conditioning,
    family_of,
)
from convfusion.families.conditioning import flatten_conditioning
from convfusion.generate import draw_batches

# Of each pipeline: the size that it draws, and the shape of its latents, [C, (T,) h, w].
DRAWN = {
    "skyreels": ({"height": 16, "width": 16, "num_frames": 5}, (4, 2, 4, 4)),
    "ltx": ({"height": 64, "width": 96, "num_frames": 9}, (4, 2, 2, 3)),
    "latte": ({"height": 16, "width": 16, "video_length": 16}, (4, 16, 8, 8)),
    "animatediff": ({"height": 16, "width": 16, "num_frames": 3}, (4, 3, 8, 8)),
    "modelscope": ({"height": 16, "width": 16, "num_frames": 3}, (4, 3, 8, 8)),
    "hunyuan": ({"height": 64, "width": 96}, (4, 8, 12)),
}
MAKE = {
    "skyreels": skyreels_v2,
    "ltx": ltx_video,
    "latte": latte_pipeline,
    "animatediff": animate_diff,
    "modelscope": text_to_video,
}
CAPTIONS = ["red apple", "green"]


@pytest.fixture(params=DRAWN)
def name(request):
    return request.param


@pytest.fixture
def pipe(name, tmp_path, monkeypatch):
    # SkyReels' pipelines clean prompts with ftfy, which ConvFusion has no other use for.
    monkeypatch.setattr("convfusion.families.skyreels.is_ftfy_available", lambda: True)
    cleaner = SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr(pipeline_skyreels_v2, "ftfy", cleaner, raising=False)
    made = hunyuan_dit(tmp_path) if name == "hunyuan" else MAKE[name]()
    made.set_progress_bar_config(disable=True)
    return made


def test_a_denoiser_is_told_what_its_pipeline_tells_it(name, pipe):
    """The arguments of a call, from captions and noisy latents, are those of the pipeline."""
    asked, shape = DRAWN[name]
    denoiser, seen = denoiser_of(pipe), []

    def keep(module, args, kwargs):
        family = family_of(module)
        named = dict(zip((family.latents, "timestep"), args, strict=False))
        seen.append({**named, **kwargs})

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    sides = {key: asked[key] for key in ("height", "width")}
    frames = {key: value for key, value in asked.items() if key not in sides}
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", **frames}
    list(draw_batches(pipe, CAPTIONS, [0, 1], tuple(sides.values()), 2, False, options))
    handle.remove()
    theirs = seen[0]
    theirs["timestep"] = torch.as_tensor(theirs["timestep"]).expand(2)
    told = encode_conditioning(pipe, CAPTIONS, tuple(sides.values()))
    family = family_of(denoiser)
    latents = family.unpack_latents(denoiser, theirs[family.latents], shape[1:])
    assert latents.shape == (2, *shape)
    ours = arrange_call(denoiser, latents, theirs["timestep"], told)
    given = {key: value for key, value in theirs.items() if value is not None}
    needless = {"enable_temporal_attentions", "image_meta_size", "style", "return_dict"}
    assert set(ours) - needless == set(given) - needless
    for key in set(ours) - needless:
        torch.testing.assert_close(ours[key], given[key], msg=key)


def test_blocks_are_distilled_from_latents_and_captions(name, pipe):
    latents = torch.randn(3, *DRAWN[name][1], generator=torch.Generator().manual_seed(5))
    convfusion.convert(pipe)
    parts = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}

    def frozen():
        return {
            f"{part}.{key}": tensor.clone()
            for part, module in parts.items()
            for key, tensor in module.state_dict().items()
            if ".mixer." not in key
        }

    before, blocks = frozen(), block_weights(pipe)
    config = DistillConfig(
        steps=2,
        imitation_steps=1,
        batch_size=2,
        held_out=1,
        start="converted",
        losses=LossWeights(noise=1.0),
    )
    result = distill(pipe, LatentDataset(latents, [*CAPTIONS, ""]), config)
    assert set(result.losses) == {"distill", "noise", "feature"}
    assert 0 < result.epsilon_error < 10
    assert all(torch.equal(before[key], tensor) for key, tensor in frozen().items())
    trained = block_weights(pipe)
    assert not any(torch.equal(blocks[key], tensor) for key, tensor in trained.items())


def test_the_teacher_draws_latents_of_prompts_into_a_cache(name, pipe, tmp_path):
    asked, shape = DRAWN[name]
    size, frames = (asked["height"], asked["width"]), asked.get("num_frames")
    prompts = Prompts("list", tuple(CAPTIONS), Drawing(steps=2, guidance=1.0))
    cache = build_cache(pipe, prompts, tmp_path / "cache", size=size, frames=frames)
    latents, told = cache.take([0, 1], [False, True])
    assert latents.shape == (2, *shape)
    expected = flatten_conditioning(encode_conditioning(pipe, ["red apple", ""], size))
    assert set(told) == set(expected)
    for key, tensor in told.items():
        torch.testing.assert_close(tensor, expected[key], msg=key)


def test_the_frames_of_a_clip_are_encoded_one_by_one_where_an_autoencoder_takes_pictures():
    vae = autoencoder()
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    latents = encode_pictures(vae, clips)
    assert latents.shape == (2, 4, 3, 8, 8)
    expected = [encode_pictures(vae, clips[:, frame]) for frame in range(3)]
    torch.testing.assert_close(latents, torch.stack(expected, dim=2))


def test_latents_of_ltx_have_the_moments_that_its_autoencoder_holds():
    vae = ltx_video().vae
    clips = np.random.default_rng(0).integers(0, 256, (1, 9, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        batch = torch.from_numpy(clips).movedim(-1, 1) / 127.5 - 1
        raw = vae.encode(batch).latent_dist.mean
    expected = LTXPipeline._normalize_latents(raw, vae.latents_mean, vae.latents_std)
    torch.testing.assert_close(encode_pictures(vae, clips), expected)


def test_a_latte_is_given_clips_of_one_length():
    pipe = latte_pipeline()
    clips = ClipFolder("clips", ())
    assert {size[0] for size in choose_sizes(pipe, clips, (256, 256), None, True)} == {16}
    with pytest.raises(ConvFusionError, match="clips of 16 frames only"):
        choose_sizes(pipe, clips, (256, 256), 8, False)


REFUSED = {
    "wan-image": "an embedding of its first frame",
    "vace": "a video to be edited",
    "cosmos": "times of a schedule of its own",
    "kandinsky": "the places of its words",
    "ltx2": "the sound of a video",
    "svd": "a picture to go on from",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_more_than_captions_a_model_takes_is_said_in_one_line(name):
    model = next(shapes_of(case.make) for case in CASES if case.name == name)
    pipe = SimpleNamespace(**{family_of(model).component: model})
    with pytest.raises(ConvFusionError, match=f"takes .*{REFUSED[name]}.*, beside a caption") as no:
        check_captioned(pipe)
    assert "\n" not in str(no.value)
