"""From samples to latents: pictures that are encoded, and prompts that the teacher draws."""

import json

import numpy as np
import pytest
import torch
from test_cache import caption, contents, encoded, picture, write_pictures
from test_sources import shard
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion import ConvFusionError
from convfusion.data import chunks
from convfusion.data.cache import build_cache
from convfusion.data.pictures import encode_pictures, upcast_vae
from convfusion.data.samples import Sample
from convfusion.data.sources import Drawing, open_source
from convfusion.surgery.config import ConvertConfig


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


def test_what_cannot_be_used_is_skipped_and_told(pipe, tmp_path):
    data = write_pictures(tmp_path / "data", 4)
    (data / "0000.png").write_bytes(b"nothing")
    (data / "0001.txt").write_text(" \n")
    (data / "0002.txt").unlink()
    for i in range(30):
        picture(i, (16, 15)).save(data / f"small{i:02d}.jpg")
        (data / f"small{i:02d}.txt").write_text("red")
    built = build_cache(pipe, open_source(str(data)), tmp_path / "cache", num_workers=2)
    assert list(built.captions) == [caption(3)]
    small = [f"small{i:02d}.jpg" for i in range(20)]
    assert built.skipped == {
        "unreadable picture": {"count": 1, "names": ["0000.png"]},
        "no caption": {"count": 2, "names": ["0001.png", "0002.png"]},
        "picture smaller than the size asked for": {"count": 30, "names": small},
    }
    assert json.loads((tmp_path / "cache/cache.json").read_text())["skipped"] == built.skipped


def test_a_cut_shard_keeps_what_is_before_the_cut(pipe, tmp_path):
    members = {"a.png": encoded(0), "a.txt": b"red", "b.png": encoded(1), "b.txt": b"green"}
    path = shard(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[:2800])
    built = build_cache(pipe, open_source(str(path)), tmp_path / "cache")
    assert list(built.captions) == ["red"]
    assert built.skipped == {"damaged shard": {"count": 1, "names": ["x.tar"]}}


def test_half_an_emoji_does_not_end_the_work(pipe, tmp_path):
    half = b'{"caption": "cute cat \\ud83d"}'
    members = {"a.png": encoded(0), "a.json": half, "b.png": encoded(1), "b.txt": b"red"}
    source = open_source(str(shard(tmp_path / "x.tar", members)))
    built = build_cache(pipe, source, tmp_path / "cache")
    assert list(built.captions) == ["red"]
    assert built.skipped == {"damaged caption": {"count": 1, "names": ["x.tar/a"]}}


def test_nothing_that_can_be_used_is_an_error(pipe, tmp_path):
    data = write_pictures(tmp_path / "data", 3, [(8, 8)])
    with pytest.raises(ConvFusionError, match="can be used: 3× picture smaller than the size"):
        build_cache(pipe, open_source(str(data)), tmp_path / "cache")
    empty = shard(tmp_path / "x.tar", {})
    with pytest.raises(ConvFusionError, match=r"x\.tar can be used: it is empty"):
        build_cache(pipe, open_source(str(empty)), tmp_path / "other")


def test_a_dit_skips_what_is_no_class(tmp_path):
    pipe = PIPELINES["dit"]()
    side = 2 * pipe.transformer.config.sample_size
    for i, text in enumerate(["red", "blue", "3"]):
        picture(i, (side, side)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    built = build_cache(pipe, open_source(str(tmp_path)), tmp_path / "cache")
    assert built.skipped["caption is no class of the model"]["names"] == ["1.png"]
    told = built.take([0, 1, 0], [False, False, True])[1]["class_labels"]
    assert told.tolist() == [0, 3, 10]
    assert list(built.manifest["rests_on"]) == ["vae", "class names"]
    with pytest.raises(ConvFusionError, match="leave the buckets out"):
        build_cache(pipe, open_source(str(tmp_path)), tmp_path / "other", buckets=True)


def test_latents_that_are_not_finite_are_named(tmp_path):
    data = write_pictures(tmp_path / "data", 3)
    broken = stable_diffusion()
    list(broken.vae.encoder.parameters())[-1].data.fill_(float("nan"))
    with pytest.raises(ConvFusionError, match=r"the latent of 0000\.png is not finite"):
        build_cache(broken, open_source(str(data)), tmp_path / "cache")


def test_a_vae_that_overflows_in_half_precision_is_run_in_float32():
    vae = stable_diffusion().vae.half()
    assert vae.config.force_upcast
    pixels = np.stack([np.array(picture(0))])
    with upcast_vae(vae):
        assert vae.dtype == torch.float32
        plain = encode_pictures(vae, pixels)
        vae.register_to_config(shift_factor=0.5)
        moved = encode_pictures(vae, pixels)
    assert vae.dtype == torch.float16
    torch.testing.assert_close(moved, plain - 0.5 * vae.config.scaling_factor)
    vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    with upcast_vae(vae):
        scaled = encode_pictures(vae, pixels)
    torch.testing.assert_close(scaled, moved / 2)


@pytest.mark.parametrize("family", list(PIPELINES))
def test_the_teacher_draws_its_own_latents(family, tmp_path):
    pipe = PIPELINES[family]()
    (tmp_path / "p.txt").write_text("red\ngreen\n")
    guidance = 1.0 if family == "dit" else 3.0  # diffusers' DiT takes class 1000 for none
    drawing = Drawing(per_prompt=2, seed=3, steps=2, guidance=guidance)
    source = open_source(str(tmp_path / "p.txt"), drawing=drawing)
    built = build_cache(pipe, source, tmp_path / "stock", batch_size=3)
    assert list(built.captions) == ["red", "red", "green", "green"]
    latents, _ = built.take([0, 1, 2, 3], [False] * 4)
    assert latents.isfinite().all() and len(latents.unique(dim=0)) == 4
    samples = [Sample("", "green", seed=5)]
    side = latents.shape[-1] * 2
    alone = chunks.draw_latents(pipe, samples, (side, side), drawing)
    torch.testing.assert_close(latents[2:3], alone, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # the picture that the pipeline itself draws of it
        decoded = pipe.vae.decode(alone / pipe.vae.config.scaling_factor).sample
    drawn = convfusion.generate.generate(
        pipe, ["green"], seeds=[5], steps=2, guidance=guidance, output_type="pt"
    )[0]
    torch.testing.assert_close((decoded[0] / 2 + 0.5).clamp(0, 1), drawn, rtol=1e-3, atol=1e-4)


def test_a_converted_pipeline_draws_with_its_attention(tmp_path):
    pipe = stable_diffusion()
    (tmp_path / "p.txt").write_text("red\ngreen\n")
    source = open_source(str(tmp_path / "p.txt"), drawing=Drawing(steps=2))
    build_cache(pipe, source, tmp_path / "stock")
    convfusion.convert(pipe, ConvertConfig())
    student = pipe.unet
    build_cache(pipe, source, tmp_path / "converted")
    assert pipe.unet is student
    assert contents(tmp_path / "stock") == contents(tmp_path / "converted")
    with pytest.raises(ConvFusionError, match="at one size"):
        build_cache(pipe, source, tmp_path / "x", buckets=True)
