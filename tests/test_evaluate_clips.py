"""Clips are compared frame by frame, and by how they move; an evaluation of them resumes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from evaluations import thumbnails
from PIL import Image
from tiny_models import randomise
from tiny_pipelines import stable_diffusion, wan
from typer.testing import CliRunner

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.checkpoint.figures import fill_table, read_rows
from convfusion.cli import app
from convfusion.clips import generate_clips
from convfusion.data import read_clip, write_clip
from convfusion.data.clips import draw_strip
from convfusion.evaluate import EvaluationSettings, evaluate, psnr, ssim
from convfusion.evaluate.comparison import REMOVED, TEACHER, compare_blocks
from convfusion.evaluate.drawn import clip_of, picture_of
from convfusion.evaluate.measure import look_at_clips
from convfusion.evaluate.motion import measure_change, measure_flicker, ratio_of_means
from convfusion.evaluate.real import open_real, open_real_clips
from convfusion.evaluate.scores import Mean
from convfusion.surgery import mixers_of

PROMPTS = ("red apple", "green", "apple")
SIDES = ("teacher", "student", "teacher-other-seed")


def settings(**fields):
    told = {"steps": 2, "guidance": 1.0, "size": (16, 16), "batch_size": 2, "frames": 5}
    told |= {"timesteps": (50, 950)}
    return EvaluationSettings(PROMPTS, (4, 5, 6), **{**told, **fields})


def student():
    pipe = wan()
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3, frame_kernel_size=3)))
    randomise(mixers_of(pipe), std=0.3)
    return pipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, evaluate(student(), settings(), folder, extractor=thumbnails())


def brightness(*levels):
    """A clip of plain frames."""
    return np.stack([np.full((4, 5, 3), level, np.uint8) for level in levels])


def test_what_changes_evenly_does_not_flicker():
    assert measure_change(brightness(10, 13, 16, 19)) == 3
    assert measure_flicker(brightness(10, 13, 16, 19)) == 0
    assert measure_change(brightness(9, 9, 9)) == measure_flicker(brightness(9, 9, 9)) == 0


def test_what_goes_back_and_forth_flickers_by_twice_its_amplitude():
    assert measure_flicker(brightness(250, 240, 250, 240)) == 10
    assert measure_change(brightness(250, 240, 250, 240)) == 10
    one_frame_off = brightness(50, 50, 62, 50, 50)
    assert measure_flicker(one_frame_off) == pytest.approx((6 + 12 + 6) / 3)


def test_few_frames_do_not_flicker():
    assert measure_change(brightness(3)) == measure_flicker(brightness(3, 9)) == 0
    assert measure_change(brightness(3, 9)) == 6


def test_a_ratio_of_means_has_the_error_of_its_prompts():
    assert ratio_of_means([3, 6, 9], [1, 2, 3], "abc") == Mean(3, pytest.approx(0, abs=1e-12))
    assert ratio_of_means([1, 2], [0, 0], "ab") == Mean(None, None)
    assert ratio_of_means([4], [2], "a") == Mean(2, None)
    rng = np.random.default_rng(0)
    taught = rng.uniform(1, 2, (4000, 20))
    shown = 1.5 * taught + rng.normal(0, 0.3, taught.shape)
    names = [str(i) for i in range(20)]
    ratios, errors = zip(
        *(ratio_of_means(*pair, names) for pair in zip(shown, taught, strict=True)), strict=True
    )
    assert np.mean(ratios) == pytest.approx(1.5, abs=0.005)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)


def test_the_clips_are_those_that_each_side_draws(finished):
    folder, _ = finished
    options = {"frames": 5, "size": (16, 16), "steps": 2, "guidance": 1.0, "batch_size": 2}
    told = settings()
    drawn = {
        "teacher": generate_clips(wan(), list(PROMPTS), seeds=list(told.seeds), **options),
        "student": generate_clips(student(), list(PROMPTS), seeds=list(told.seeds), **options),
        "teacher-other-seed": generate_clips(
            wan(), list(PROMPTS), seeds=list(told.other_seeds), **options
        ),
    }
    for side, clips in drawn.items():
        for number, clip in enumerate(clips):
            assert np.array_equal(read_clip(clip_of(folder, side, number), 5), clip), side
            with Image.open(picture_of(folder, side, number)) as strip:
                assert np.array_equal(np.asarray(strip)[:, :16], clip[0])


def test_numbers_are_means_over_frames(finished):
    folder, found = finished
    for number, sample in enumerate(found.samples):
        taught, shown, other = (read_clip(clip_of(folder, s, number), 5) for s in SIDES)
        for clip, alike in ((shown, sample.student), (other, sample.other_seed)):
            assert alike.psnr == pytest.approx(np.mean([*map(psnr, clip, taught)]))
            assert alike.ssim == pytest.approx(np.mean([*map(ssim, clip, taught)]))
        for side, clip in zip(SIDES, (taught, shown, other), strict=True):
            assert found.motion.change[side][number] == measure_change(clip)
            assert found.motion.flicker[side][number] == measure_flicker(clip)
        seen = thumbnails()(Image.fromarray(f) for f in (*taught, *shown)).features
        means = seen.view(2, 5, -1).mean(1).double()
        assert sample.student.cosine == pytest.approx(torch.cosine_similarity(*means, dim=0).item())
    first = [
        psnr(*(read_clip(clip_of(folder, side, n), 1)[0] for side in ("student", "teacher")))
        for n in range(3)
    ]
    assert found.motion.frame_psnr["student"][0] == pytest.approx(np.mean(first))
    error = np.std(first, ddof=1) / 3**0.5
    assert found.motion.frame_psnr_error["student"][0] == pytest.approx(error)


def test_tables_and_page_tell_of_motion(finished):
    folder, found = finished
    told = json.loads((folder / "evaluation.json").read_text())
    assert (told["settings"]["frames"], told["settings"]["frame_rate"]) == (5, 16)
    assert told["settings"]["predicts"] == "velocity"
    assert told["motion"]["flicker"] == found.motion.flicker
    with open(folder / "evaluation.csv", newline="", encoding="utf-8") as file:
        table = {(r["metric"], r["pictures"], r["reference"]): r for r in csv.DictReader(file)}
    ratio = float(table["flicker_ratio", "student", "teacher"]["value"])
    means = {side: np.mean(found.motion.flicker[side]) for side in SIDES}
    assert ratio == pytest.approx(means["student"] / means["teacher"])
    assert float(table["flicker", "teacher", ""]["value"]) == pytest.approx(means["teacher"])
    with open(folder / "frames.csv", newline="", encoding="utf-8") as file:
        frames = [(row["pictures"], row["frame"]) for row in csv.DictReader(file)]
    assert frames == [(s, str(t)) for s in ("student", "teacher-other-seed") for t in range(5)]
    with open(folder / "samples.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["student_flicker"]) for row in rows] == found.motion.flicker["student"]
    page = (folder / "report.html").read_text()
    assert "3 clips of 5 frames of 16×16" in page and "velocity error" in page
    assert "the student’s clips have a PSNR of" in page and "Its clips flicker" in page
    assert page.count("data:image/webp;base64,") == 1
    assert "pictures" not in page.partition("<body>")[2].replace("wide tables and pictures", "")


def test_a_model_card_tells_of_motion(finished):
    folder, _ = finished
    record = json.loads((folder / "evaluation.json").read_text())
    card = fill_table(record, read_rows(folder / "evaluation.csv"))
    assert "| against the base model's clips |" in card
    assert "\n| velocity error, 0 is equal |" in card and "ε-error" not in card
    assert "\n| flicker, 1 is as much |" in card
    assert "3 clips of 3 prompts, 5 frames of 16×16 pixels" in card


def test_clips_that_are_damaged_are_drawn_again(finished, tmp_path):
    folder, _ = finished
    again = tmp_path / "out"
    shutil.copytree(folder, again)
    (clip_of(again, "student", 0) / "003.png").write_bytes(b"no frame")
    (clip_of(again, "teacher", 2) / "000.png").unlink()
    evaluate(student(), settings(), again, extractor=thumbnails())
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_what_cannot_be_compared_is_told_before_it_is_drawn(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "real.png")
    (tmp_path / "real").mkdir()
    image = stable_diffusion()
    convfusion.convert(image, uniform(DeltaConv(kernel_size=3)))
    real = open_real(str(tmp_path), (16, 16))
    write_clip(brightness(1, 2, 3, 4, 5).repeat(4, 1).repeat(4, 2), tmp_path / "real" / "a.gif", 8)
    write_clip(brightness(1, 2).repeat(4, 1).repeat(4, 2), tmp_path / "real" / "short.gif", 8)
    clips = open_real_clips(str(tmp_path / "real"), 5, (16, 16))
    for pipe, fields, options, message in (
        (student(), {"frames": None}, {}, "draws videos, and pictures are drawn here"),
        (student(), {"frames": 6}, {}, "1 more than a multiple of 4"),
        (image, {}, {}, "draws pictures, which have no frames"),
        (student(), {}, {"real": real}, "clips with real clips"),
        (student(), {}, {"real": clips}, "1 of the clips of real can be used, and 2 or more"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            asked = settings(**fields)
            evaluate(pipe, asked, tmp_path / "out", extractor=thumbnails(), **options)
    assert not (tmp_path / "out").exists()


def test_rows_of_strips_have_the_mean_psnr_of_frames(tmp_path):
    pipe = student()
    convfusion.save(pipe, tmp_path / "blocks")
    options = {"size": (16, 16), "steps": 2, "guidance": 1.0, "progress": False}
    compared = compare_blocks(
        wan(), {"mine": tmp_path / "blocks"}, PROMPTS[:2], removed=True, frames=5, **options
    )
    assert list(compared.rows) == [TEACHER, "mine", REMOVED]
    options |= {"frames": 5, "seeds": [0, 0]}
    shown, taught = (generate_clips(each, list(PROMPTS[:2]), **options) for each in (pipe, wan()))
    values = [np.mean([*map(psnr, *pair)]) for pair in zip(shown, taught, strict=True)]
    assert compared.psnr["mine"].value == pytest.approx(np.mean(values))
    for row, clips in ((TEACHER, taught), ("mine", shown)):
        for strip, clip in zip(compared.rows[row], clips, strict=True):
            assert np.array_equal(np.asarray(strip), np.asarray(draw_strip(clip)))


def test_real_clips_are_one_more_set(finished, tmp_path):
    folder, _ = finished
    again = tmp_path / "out"
    shutil.copytree(folder, again)
    real = tmp_path / "real"
    real.mkdir()
    made = np.random.default_rng(0).integers(0, 256, (3, 7, 20, 20, 3), dtype=np.uint8)
    for number, clip in enumerate(made):
        (real / str(number)).mkdir()
        for frame, picture in enumerate(clip):
            Image.fromarray(picture).save(real / str(number) / f"{frame}.png")
    Image.open(real / "0" / "0.png").save(real / "still.gif")
    opened = open_real_clips(str(real), 5, (16, 16))
    found = evaluate(student(), settings(), again, extractor=thumbnails(), real=opened)
    assert found.real == {
        "name": "real", "samples": 3, "skipped": {"fewer frames than asked for": 1},
    }  # fmt: skip
    rows = [row for row in found.distributions if row.reference == "real"]
    assert [row.pictures for row in rows] == ["student", "teacher", "teacher-other-seed"]
    assert {row.reference_samples for row in rows} == {3}
    seen = [
        thumbnails()(Image.fromarray(f) for f in read_clip(path, 5, (16, 16))).features.mean(0)
        for path in opened.paths[:3]
    ]
    looked = look_at_clips(thumbnails(), opened, 5).features
    torch.testing.assert_close(looked, torch.stack(seen))
    assert "Against real clips" in (again / "report.html").read_text()


def test_the_command_has_frames_for_videos_only(tmp_path):
    wan().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red\ngreen\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "real.png")
    rest = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    video = str(tmp_path / "model")
    for model, options, message in (
        ("mini", ("--frames", "5"), "draws pictures: leave --frames out"),
        (video, ("--frames", "6"), "1 more than a multiple of 4"),
        (video, ("--real", str(tmp_path)), f"{tmp_path} has no clips"),
    ):
        shown = CliRunner().invoke(app, ["evaluate", model, *options, *rest])
        assert shown.exit_code != 0 and message in f"{shown.output} {shown.exception}"
    assert not (tmp_path / "out").exists()
