"""Clips are drawn from seeds of their own, and written with what they were drawn with."""

import re
import sys

import numpy as np
import pytest
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from PIL import Image
from tiny_pipelines import stable_diffusion, wan
from typer.testing import CliRunner

import convfusion
from convfusion import ConvFusionError, MeanOnly, uniform
from convfusion.cli import app
from convfusion.clips import generate_clips
from convfusion.data import list_clips, read_clip
from convfusion.generate import generate
from convfusion.imports import is_installed

pytestmark = pytest.mark.libraries

SMALL = {"size": (16, 16), "steps": 2, "progress": False}
VIDEO = ".mp4" if is_installed("av") else ".gif"


def animatediff() -> AnimateDiffPipeline:
    """Draws 8 frames at most."""
    image = stable_diffusion()
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    return AnimateDiffPipeline(
        vae=image.vae,
        text_encoder=image.text_encoder,
        tokenizer=image.tokenizer,
        unet=image.unet,
        motion_adapter=adapter.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )


@pytest.mark.parametrize(("make", "frames"), [(wan, 5), (animatediff, 4)])
def test_a_clip_depends_on_its_prompt_and_seed_alone(make, frames):
    pipe = make()
    convfusion.convert(pipe, uniform(MeanOnly()))
    texts = ["red apple", "green"]
    alone = generate_clips(pipe, texts, frames=frames, **SMALL)
    assert [(clip.shape, clip.dtype) for clip in alone] == [((frames, 16, 16, 3), np.uint8)] * 2
    assert not np.array_equal(*alone)
    together = generate_clips(pipe, texts[::-1], frames=frames, seeds=[1, 0], batch_size=2, **SMALL)
    for one, other in zip(alone, together[::-1], strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1  # rounding of sums of two


def test_frames_are_the_model_s_own_unless_they_are_told(monkeypatch):
    pipe = wan()
    monkeypatch.setattr(type(convfusion.families.FAMILIES["wan"]), "frames", 2)
    (clip,) = generate_clips(pipe, ["red apple"], **SMALL)
    assert len(clip) == 5  # the first frame has latents of its own, and the others go in fours


def test_what_cannot_be_drawn_is_told_before_it_is_begun():
    video, image = wan(), stable_diffusion()
    for pipe, options, message in (
        (video, {"frames": 6}, "6 frames cannot be drawn: .* 1 more than a multiple of 4; .* is 5"),
        (video, {"frames": 0}, "at least 1 frame, not 0"),
        (video, {"frames": 5, "num_frames": 5}, "frames tells the num_frames"),
        (video, {"num_videos_per_prompt": 2}, "one clip is drawn for each prompt"),
        (animatediff(), {"frames": 9}, "draws clips of 8 frames at most, not 9"),
        (image, {"frames": 5}, "draws pictures, which have no frames"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            generate_clips(pipe, ["red apple"], **{**SMALL, **options})
    with pytest.raises(ConvFusionError, match="draws videos, and pictures are drawn here"):
        generate(video, ["red apple"], **SMALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    wan().save_pretrained(folder)
    return str(folder)


def run(*arguments):
    shown = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    return shown.exit_code, f"{shown.output} {shown.exception}"


def test_the_command_writes_clips_with_their_strips(model, tmp_path):
    out = tmp_path / "clips"
    asked = (model, "--size", "16x16", "--steps", 2, "--out", out)
    code, said = run(*asked, "--prompt", "red apple", "--prompt", "green", "--frames", 5)
    assert code == 0, said
    assert run(*asked, "--prompt", "red apple", "--seed", 7, "--frames", 1)[0] == 0
    names = [f"0000{i}-seed{seed}" for i, seed in enumerate((0, 1, 7))]
    wanted = {f"{name}{kind}" for name in names for kind in (VIDEO, ".png")}
    assert {path.name for path in out.iterdir()} == wanted
    clips = list_clips(out)
    drawn = generate_clips(wan(), ["red apple", "green"], frames=5, **SMALL)
    for path, clip in zip(clips, drawn, strict=False):
        assert np.abs(read_clip(path, 5).astype(int) - clip).mean() < 20  # noise, with losses
    with Image.open(out / f"{names[0]}.png") as strip:
        assert strip.size == (5 * 16 + 4 * 2, 16)
        assert np.array_equal(np.array(strip)[:, :16], drawn[0][0])
        assert strip.text["prompt"] == "red apple" and strip.text["frames"] == "5"
        assert "Seed: 0, Frames: 5, Model: tiny-wan" in strip.text["parameters"]
    assert b"Seed: 0, Frames: 5, Model: tiny-wan" in clips[0].read_bytes()


def test_without_its_library_the_command_writes_gifs_and_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    asked = (model, "--prompt", "red apple", "--frames", 5, "--size", "16x16", "--steps", 1)
    code, said = run(*asked, "--out", tmp_path / "clips")
    assert code == 0 and "written as GIFs; with pip install 'convfusion[video]'" in said
    assert read_clip(tmp_path / "clips" / "00000-seed0.gif", 5).shape == (5, 16, 16, 3)
    code, said = run(*asked, "--out", tmp_path / "one.mp4")
    assert code != 0 and "needs av: pip install 'convfusion[video]'" in said
    assert run(*asked, "--out", tmp_path / "one.gif")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", 6), "1 more than a multiple of 4"),
        (("--fps", 0), "more than 0 and up to 1000 frames a second, not 0"),
        (("--hybrid",), "--hybrid is for pictures"),
        (("--memory", 2), "--memory is for pictures"),
        (("--out", "x.png"), r"draws videos: name a folder, or a file such as x\.mp4"),
        (("--out", "there.gif"), r"there\.png exists already"),
    ],
)
def test_options_that_do_not_fit_a_video_are_told(model, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").touch()
    code, said = run(model, "--prompt", "red apple", "--size", "16x16", *options)
    assert code != 0
    assert re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


@pytest.mark.parametrize("options", [("--frames", 3), ("--fps", 3), ("--out", "x.gif")])
def test_options_of_clips_do_not_fit_pictures(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    code, said = run("mini", "--prompt", "red apple", *options)
    assert code != 0 and "draws pictures" in said and not list(tmp_path.iterdir())
