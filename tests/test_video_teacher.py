"""The small video model in Wan's layout: its clips say what they show, and it is made again."""

import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

pytestmark = pytest.mark.libraries

MINI = Path(__file__).parent.parent / "recipes" / "mini"
TRAIN = ("--clips", "4", "--batch", "2", "--picture-steps", "1", "--sample-every", "99")
EVEN = ("--vae-decay-steps", "1", "--decay-steps", "1")  # the rate does not depend on the last step


@pytest.fixture
def video(monkeypatch):
    monkeypatch.syspath_prepend(MINI)
    return importlib.import_module("video")


@pytest.fixture
def teacher(video):
    return importlib.import_module("video_teacher")


@pytest.fixture
def train(video, teacher, monkeypatch):
    """The whole recipe on models that are as small as they can be: called with a run's folder."""
    vae = importlib.import_module("video_vae")

    def make_vae():
        return vae.AutoencoderKLWan(
            base_dim=4,
            z_dim=8,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            is_residual=True,
            latents_mean=[0.0] * 8,
            latents_std=[1.0] * 8,
            scale_factor_spatial=4,
        )

    def make_transformer():
        return teacher.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=8,
            out_channels=8,
            text_dim=teacher.TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=24,
            num_layers=1,
        )

    monkeypatch.setattr(vae, "make_vae", make_vae)
    monkeypatch.setattr(vae, "MEASURED", range(2))
    monkeypatch.setattr(teacher, "make_transformer", make_transformer)
    monkeypatch.setattr(teacher, "DRAWN", range(1))
    monkeypatch.setattr(teacher, "JUDGED", 1)
    monkeypatch.setattr(video, "STEPS", 2)

    def run(folder, steps):
        given = ("--steps", str(steps), "--vae-steps", "2", *TRAIN, *EVEN)
        monkeypatch.setattr(sys, "argv", ["x", "--run", str(folder), "train", *given])
        teacher.main()
        return folder / "video"

    return run


def shown(video, one):
    """How many pixels of each frame differ from the ground, and the middle of them, x and y."""
    ground = torch.tensor(video.GROUNDS[one.ground]).view(3, 1, 1, 1) / 127.5 - 1
    there = (video.draw(one) - ground).abs().amax(dim=0) > 0.1
    axis = torch.arange(64.0)
    area = there.sum(dim=(1, 2))
    x, y = ((there.sum(dim=other) * axis).sum(dim=1) / area for other in (1, 2))
    return area, x, y


def clips_of(video, motion):
    """The same three emoji with each motion, of several sizes."""
    for number, emoji in enumerate(("dog face", "key", "umbrella")):
        size, reach = 28 + 4 * number, 0.6 + 0.2 * number
        yield video.Clip(emoji, motion, "pink", size, reach, (number - 1.0, 1.0 - number))


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moves left", 0, -1), ("moves right", 0, 1), ("moves up", 1, -1), ("moves down", 1, 1)],
)
def test_what_moves_goes_where_its_caption_says(video, motion, axis, sign):
    for one in clips_of(video, motion):
        _, *middle = shown(video, one)
        along, across = middle[axis], middle[1 - axis]
        assert (sign * along.diff() > 0.5).all()
        assert sign * (along[-1] - along[0]) > 12
        assert across.max() - across.min() < 0.7


def test_what_spins_turns_once_clockwise_where_it_stands(video):
    for one in clips_of(video, "spins"):
        frames = video.draw(replace(one, offset=(0.0, 0.0)))
        for quarter in range(5):
            upright = torch.rot90(frames[:, 4 * quarter], quarter, dims=(1, 2))  # anticlockwise
            torch.testing.assert_close(upright, frames[:, 0], atol=1e-3, rtol=0)
        assert (frames[:, 0] - frames[:, 4]).abs().max() > 0.5


@pytest.mark.parametrize(("motion", "sign"), [("grows", 1), ("shrinks", -1)])
def test_what_grows_or_shrinks_changes_its_size_alone(video, motion, sign):
    for one in clips_of(video, motion):
        area, *middle = shown(video, one)
        sizes = area.flip(0) if sign < 0 else area
        assert (sizes.diff() > -0.02 * sizes[:-1]).all()
        assert 2.5 < sizes[-1] / sizes[0] < 12
        assert all((each.max() - each.min()) < 4 for each in middle)


def test_what_bounces_hops_twice(video):
    for one in clips_of(video, "bounces"):
        _, x, y = shown(video, one)
        assert x.max() - x.min() < 0.7
        on_the_ground, in_the_air = y[[0, 8, 16]], y[[4, 12]]
        assert on_the_ground.min() - in_the_air.max() > 12
        assert (y <= on_the_ground.max() + 0.1).all()
        assert (y >= in_the_air.min() - 0.1).all()


def test_nothing_leaves_the_picture(video):
    for number in range(60):
        one = video.clip("train", number)
        frames = video.draw(one)
        ground = torch.tensor(video.GROUNDS[one.ground]).view(3, 1, 1) / 127.5 - 1
        edges = (frames[..., 0, :], frames[..., -1, :], frames[..., 0], frames[..., -1])
        for edge in edges:
            assert (edge - ground).abs().max() < 0.25, one


def test_a_pair_of_emoji_and_motion_is_on_one_side(video):
    sides = {side: video.pairs(side) for side in ("train", "choice", "results")}
    assert {side: len(pairs) for side, pairs in sides.items()} == {
        "train": 240, "choice": 40, "results": 40,
    }  # fmt: skip
    every = [pair for pairs in sides.values() for pair in pairs]
    assert len(set(every)) == len(every) == len(video.EMOJI) * len(video.MOTIONS)
    for side, motions in (("train", 6), ("choice", 1), ("results", 1)):
        emoji, motion = zip(*sides[side], strict=True)
        assert set(Counter(emoji).values()) == {motions}
        assert set(Counter(motion).values()) == {5 * motions}


def test_a_clip_is_made_of_its_side_and_number_alone(video):
    for side in ("train", "choice", "results"):
        clips = [video.clip(side, number) for number in range(300)]
        assert {(one.emoji, one.motion) for one in clips} == set(video.pairs(side))
        assert {one.ground for one in clips} == set(video.GROUNDS)
        assert clips[7] == video.clip(side, 7)
        assert len({(one.size, one.reach, one.offset) for one in clips}) == len(clips)
    assert video.Clip("key", "spins", "grey", 30, 1, (0, 0)).caption == "key spins on grey"


def test_motion_and_ground_are_read_off_a_clip(video):
    measure = importlib.import_module("video_measure")
    for number in range(0, 240, 3):
        one = video.clip("train", number)
        frames = video.draw(one)
        assert measure.motion_of(frames) == one.motion
        assert measure.ground_of(frames) == one.ground
        assert measure.motion_of(frames[..., :1, :1].expand_as(frames)) is None


def test_the_autoencoder_sees_no_held_out_pair(video, monkeypatch):
    vae = importlib.import_module("video_vae")
    seen = []
    monkeypatch.setattr(vae, "clip", lambda side, number: seen.append(side) or video.clip(side, 0))
    shapes = [vae.autoencoder_batch(step).shape for step in range(5)]
    assert shapes == [(1, 3, 17, 64, 64), *[(8, 3, 9, 24, 24)] * 3, (1, 3, 17, 64, 64)]
    assert vae.autoencoder_batch(1, clips=3).shape == (3, 3, 17, 64, 64)
    assert set(seen) == {"train"}


def test_every_word_of_every_caption_is_a_token(video, teacher):
    tokenizer = teacher.make_tokenizer()
    for emoji in video.EMOJI:
        for motion in video.MOTIONS:
            text = f"{emoji} {motion} on white"
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split()) + 1 <= teacher.WORDS
            assert tokenizer.unk_token_id not in ids


def test_short_captions_are_attended_to_as_the_pipeline_pads_them(teacher):
    tokenizer = teacher.make_tokenizer()
    text_encoder = teacher.make_text_encoder(tokenizer).eval()
    transformer = teacher.make_transformer()
    torch.nn.init.normal_(transformer.proj_out.weight)
    pipe = WanPipeline(tokenizer, text_encoder, None, teacher.make_scheduler(), transformer)
    texts, latents = ["dog face moves left on pink", ""], torch.randn(2, 8, 2, 4, 4)
    timesteps = torch.tensor([300.0, 700.0])
    with torch.no_grad():
        padded, _ = pipe.encode_prompt(texts, None, False, max_sequence_length=512)
        expected = transformer(latents, timesteps, padded).sample
        for block in transformer.blocks:
            block.attn2.set_processor(teacher.PaddedAttention())
        short = teacher.embed(text_encoder, tokenizer, texts)
        found = transformer(latents, timesteps, short).sample
    assert padded.shape == (2, 512, 96)
    assert short.shape == (2, 12, 96)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_its_tokens_are_a_grid_of_5x8x8(video, teacher):
    vae = importlib.import_module("video_vae").make_vae().eval()
    latents = video.encode(vae, video.draw(video.clip("train", 0))[None])
    assert latents.shape == (1, 8, 5, 16, 16)
    transformer = teacher.make_transformer()
    with torch.no_grad():
        cos, _ = transformer.rope(latents)
        assert cos.shape == (1, 5 * 8 * 8, 1, 32)
        assert vae.decode(latents).sample.shape == (1, 3, 17, 64, 64)


def test_a_batch_has_first_frames_alone_and_then_whole_clips(teacher):
    args = type("Args", (), {"batch": 2, "seed": 0, "picture_steps": 3})
    batches = teacher.Batches(args, torch.randn(6, 8, 5, 16, 16), list("abcdef"))
    clean, noise, share, texts = batches(2)
    assert clean.shape == noise.shape == (10, 8, 1, 16, 16)
    assert all((share >= 0).flatten()) and all((share <= 1).flatten())
    assert len(texts) == 10
    again = batches(3)
    assert again[0].shape == (2, 8, 5, 16, 16)
    assert torch.equal(again[1], batches(3)[1])
    assert not torch.equal(again[1], batches(4)[1])


def test_the_recipe_goes_on_as_if_it_had_not_stopped(train, teacher, tmp_path):
    whole = train(tmp_path / "whole", steps=3)
    (tmp_path / "parts" / "video").mkdir(parents=True)
    teacher.train_vae(tmp_path / "parts" / "video", 1, 1, 0, "cpu")
    train(tmp_path / "parts", steps=2)
    parts = train(tmp_path / "parts", steps=3)
    for name, steps in (("vae.pt", 2), ("teacher.pt", 3)):
        one, other = (torch.load(run / name, weights_only=True) for run in (whole, parts))
        assert one["step"] == other["step"] == steps
        for key, tensor in one["model"].items():
            assert torch.equal(tensor, other["model"][key]), (name, key)


def test_what_is_packaged_draws_as_what_was_trained(train, video, teacher, tmp_path, monkeypatch):
    run = train(tmp_path, steps=2)
    kept = tmp_path / "kept"
    monkeypatch.setattr(teacher, "KEPT", kept)
    teacher.package(run)
    pipe = video.load_video(kept)
    assert isinstance(pipe, WanPipeline)
    assert isinstance(pipe.transformer.blocks[0].attn2.processor, WanAttnProcessor)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    drawn = video.generate(pipe, ["dog face moves left on pink"] * 2)
    assert drawn.shape == (2, 3, 17, 64, 64)
    assert not torch.equal(drawn[0], drawn[1])  # a seed each
    trained = video.generate(video.load_video(run / "teacher"), ["dog face moves left on pink"])
    torch.testing.assert_close(drawn[:1], trained, atol=0.02, rtol=0)
    assert (run / "teacher-000002.png").exists()
    assert (kept / "drawn.png").exists()
    for file in kept.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    facts = json.loads((kept / "video.json").read_text())
    assert facts["steps"] == 2
    for side in ("train", "results"):
        assert set(facts[side]) == {"psnr", "velocity", "motion", "ground"}
        assert 0.5 < facts[side]["velocity"] < 2  # it says next to nothing yet
    latents, captions = video.latents(pipe.vae, "choice", 3)
    assert latents.shape == (3, 8, 5, 16, 16)
    assert captions == [video.clip("choice", number).caption for number in range(3)]


def test_what_is_kept_is_small_and_draws(video, monkeypatch):
    assert sum(file.stat().st_size for file in video.KEPT.rglob("*") if file.is_file()) <= 12e6
    pipe = video.load_video()
    monkeypatch.setattr(video, "STEPS", 2)
    drawn = video.generate(pipe, [video.clip("choice", 0).caption])
    assert drawn.shape == (1, 3, 17, 64, 64)
    assert drawn.isfinite().all()
    clip = video.draw(video.clip("results", 0))[None]
    with torch.no_grad():
        error = (pipe.vae(clip).sample - clip).div(2).square().mean()
    facts = json.loads((video.KEPT / "video.json").read_text())
    assert -10 * error.log10() == pytest.approx(facts["results"]["psnr"], abs=5)
    latents = video.encode(pipe.vae, clip)
    assert 0.7 < latents.std() < 1.4
