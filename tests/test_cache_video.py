"""Latents of videos in a cache: clips of several kinds, their captions, sizes and lengths."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import stable_diffusion, wan
from typer.testing import CliRunner

import convfusion
from convfusion import ConvFusionError, Halo, uniform
from convfusion.cli import app
from convfusion.data import build_cache, open_cache, open_source
from convfusion.data.buckets import list_lengths
from convfusion.data.clips import read_clip, write_clip
from convfusion.data.sources import Drawing
from convfusion.distill import DistillConfig, distill
from convfusion.families import encode_conditioning
from convfusion.files import read_tensors

SMALL = {"size": (16, 16), "frames": 9}
SIDES = ("--size", "16x16", "--frames", "9")


@pytest.fixture(scope="module")
def pipe():
    return wan()


def frames(count, height=16, width=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save_frames(clip, folder):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{number}.png")  # 10 comes behind 9


@pytest.fixture
def clips(tmp_path):
    """Two folders of frames and a GIF, with their captions, and a clip that is too short."""
    folder = tmp_path / "clips"
    save_frames(frames(12), folder / "one")
    save_frames(frames(9, 20, 24, seed=1), folder / "inner" / "two")
    save_frames(frames(3), folder / "short")
    write_clip(frames(9, seed=2), folder / "three.gif", 10)
    for name in ("one", "inner/two", "short", "three"):
        (folder / f"{name}.txt").write_text("red apple" if name == "one" else "green")
    return folder


def encode(pipe, clip):
    """Latents as the pipeline's own: (mean − m)/s of its channels."""
    with torch.no_grad():
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        mean = pipe.vae.encode(video).latent_dist.mean
    shift, scale = (
        torch.tensor(each).view(1, -1, 1, 1, 1)
        for each in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return (mean - shift) / scale


def test_clips_are_encoded_with_their_captions(pipe, clips, tmp_path):
    cache = build_cache(pipe, clips, tmp_path / "cache", **SMALL)
    assert cache.sizes == [(9, 16, 16)]
    assert sorted(cache.captions) == ["green", "green", "red apple"]
    assert cache.skipped == {"fewer frames than asked for": {"count": 1, "names": ["short"]}}
    place = cache.captions.index("red apple")
    latents, told = cache.take([place, place], [False, True])
    assert latents.shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(
        latents[:1], encode(pipe, read_clip(clips / "one", 9)), rtol=1e-4, atol=1e-5
    )
    expected = encode_conditioning(pipe, ["red apple", ""], (16, 16))
    assert torch.equal(told["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert told["encoder_hidden_states"].shape == (2, 512, 12)
    files = (tmp_path / "cache" / "chunks").glob("*.safetensors")
    assert all(read_tensors(file)["16x16x9/encoder_hidden_states"].shape[1] == 3 for file in files)


def test_a_cache_goes_on_and_is_opened_for_its_size_alone(pipe, clips, tmp_path):
    first = build_cache(pipe, clips, tmp_path / "cache", **SMALL)
    assert build_cache(pipe, clips, tmp_path / "cache", **SMALL).manifest == first.manifest
    assert len(open_cache(pipe, tmp_path / "cache", size=(16, 16), frames=9)) == 3
    with pytest.raises(ConvFusionError, match="built for 16x16x9, not for 16x16x5"):
        open_cache(pipe, tmp_path / "cache", frames=5)
    with pytest.raises(ConvFusionError, match="built for 16x16x9, not for 24x16x9"):
        open_cache(pipe, tmp_path / "cache", size=(16, 24))
    (clips / "one.txt").write_text("apple")
    with pytest.raises(ConvFusionError, match="begun with another source"):
        build_cache(pipe, clips, tmp_path / "cache", **SMALL)


def test_buckets_are_of_sizes_and_of_lengths(pipe, tmp_path):
    clips = tmp_path / "clips"
    for name, clip in {
        "one": frames(9, 24, 24),
        "wide": frames(6, 16, 40),
        "long": frames(12, 48, 30),
        "short": frames(4, 24, 24),
    }.items():
        save_frames(clip, clips / name)
        (clips / f"{name}.txt").write_text("apple")
    cache = build_cache(pipe, clips, tmp_path / "cache", size=(24, 24), frames=9, buckets=True)
    assert sorted(cache.sizes) == [(5, 16, 32), (9, 24, 24), (9, 32, 16)]
    shapes = {tuple(cache.take(group, [False])[0].shape[2:]) for group in cache.groups}
    assert shapes == {(2, 4, 8), (3, 6, 6), (3, 8, 4)}
    assert cache.skipped["fewer frames than asked for"]["names"] == ["short"]
    assert list_lengths(81, 4) == [81, 41, 21]
    assert list_lengths(9, 4) == [9, 5]
    assert list_lengths(5, 4) == [5]


def test_captions_may_lie_in_a_metadata_file(pipe, clips, tmp_path):
    for file in clips.rglob("*.txt"):
        file.unlink()
    rows = [{"file_name": "one", "text": "red"}, {"file_name": "three.gif", "text": "apple"}]
    rows.append({"file_name": "inner/two", "text": ""})
    rows.append({"file_name": "short", "text": "red"})
    (clips / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(clips)
    read = {sample.name: sample for unit in range(source.units) for sample in source.read(unit)}
    assert {name: sample.caption for name, sample in read.items()} == {
        "one": "red", "three.gif": "apple", "inner/two": "", "short": "red",
    }  # fmt: skip
    assert read["inner/two"].problem == "no caption"


def test_prompts_are_drawn_by_the_pipelines_own_attention(pipe, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\ngreen\n")
    source = open_source(file, drawing=Drawing(steps=2, guidance=1.0, seed=4))
    converted = wan()
    convfusion.convert(converted, uniform(Halo(block=(1, 2, 2), window=(1, 2, 2))))
    cache = build_cache(converted, source, tmp_path / "cache", **SMALL)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "green",
        height=16,
        width=16,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames
    torch.testing.assert_close(cache.take([1], [False])[0], drawn, rtol=1e-4, atol=1e-5)


def test_a_run_from_a_folder_of_clips(clips, tmp_path):
    pipe = wan()
    convfusion.convert(pipe, uniform(Halo(block=(1, 2, 2), window=(1, 2, 2))))
    cache = build_cache(pipe, clips, tmp_path / "cache", buckets=True, **SMALL)
    config = DistillConfig(steps=2, imitation_steps=1, batch_size=2, held_out=1, workers=1)
    result = distill(pipe, cache, config, tmp_path / "run")
    assert result.steps == 2
    assert result.epsilon_error > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (16, 16), "frames": 8}, "1 more than a multiple of 4; the nearest is 9"),
        ({"size": (16, 18), "frames": 9}, "multiples of 8"),
    ],
)
def test_sizes_without_latents_are_refused(pipe, clips, tmp_path, options, message):
    with pytest.raises(ConvFusionError, match=message):
        build_cache(pipe, clips, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_clips_and_pictures_are_told_apart(pipe, clips, tmp_path):
    with pytest.raises(ConvFusionError, match="holds clips, and this pipeline draws pictures"):
        build_cache(stable_diffusion(), clips, tmp_path / "cache")
    pictures = tmp_path / "pictures"
    save_frames(frames(2), pictures)
    for name in ("0", "1"):
        (pictures / f"{name}.txt").write_text("red")
    with pytest.raises(ConvFusionError, match="holds pictures, and this pipeline draws videos"):
        build_cache(pipe, pictures, tmp_path / "cache", **SMALL)
    with pytest.raises(ConvFusionError, match="leave the frames out"):
        build_cache(stable_diffusion(), pictures, tmp_path / "cache", frames=9)


def test_clips_without_captions_are_refused(tmp_path):
    write_clip(frames(5), tmp_path / "one.gif", 10)
    with pytest.raises(ConvFusionError, match=r"one\.txt should lie beside one\.gif"):
        open_source(tmp_path)
    (tmp_path / "one.txt").write_text("red")
    assert len(open_source(tmp_path)) == 1
    with pytest.raises(ConvFusionError, match="without a metadata file: it has no column 'film'"):
        open_source(tmp_path, image="film")


def test_the_commands_take_clips(clips, tmp_path):
    model, cache, blocks = (str(tmp_path / name) for name in ("model", "cache", "blocks"))
    wan().save_pretrained(model)
    told = run("cache", model, "--data", str(clips), "--out", cache, *SIDES, "--workers", "0")
    assert "16x16x9" in told
    training = ("--data", cache, "--batch-size", "2", "--tracker", "none")
    told = run("distill", model, *training, "--dry-run")
    assert "2 of 2" in told
    given = ("--steps", "1", "--held-out", "1", "--prompt", "green", "--frames", "9")
    told = run("distill", model, *training, *given, "--out", blocks)
    assert "ε-error on 1 held-out samples" in told
    assert "--frames 9 --size 16x16" in told
    with Image.open(tmp_path / "blocks" / "validation" / "step-0000001.png") as shown:
        assert shown.width > 6 * 16  # frames in a row
    assert "frames = 9" in (tmp_path / "blocks" / "run.toml").read_text()
    failed = CliRunner().invoke(app, ["distill", model, *training, "--frames", "5", "--out", "x"])
    assert failed.exit_code
    assert "built for 16x16x9, not for 16x16x5" in str(failed.exception)


def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output
