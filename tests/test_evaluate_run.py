"""A whole evaluation on tiny pipelines: what it writes, and that it resumes."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import PROMPTS, files, make_settings, student, thumbnails
from PIL import Image
from tiny_pipelines import stable_diffusion

from convfusion import ConvFusionError
from convfusion import files as files_module
from convfusion.evaluate import drawing as drawing_module
from convfusion.evaluate import epsilon_errors, evaluate, psnr
from convfusion.evaluate.drawing import recorded_latents
from convfusion.evaluate.drawn import picture_of
from convfusion.evaluate.real import open_real
from convfusion.families import encode_conditioning
from convfusion.fingerprint import fingerprint
from convfusion.folders import locked
from convfusion.generate import generate
from convfusion.schedule import noise_schedule
from convfusion.surgery import attention_teacher, mixers_of

pytestmark = pytest.mark.libraries


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted, its folder and what it found."""
    folder = tmp_path_factory.mktemp("run") / "out"
    real = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(real / f"{i}.png")
    (real / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(real / "small.png")
    pipe = student()
    found = evaluate(
        pipe, make_settings(), folder, extractor=thumbnails(), real=open_real(str(real), (16, 16))
    )
    return folder, found, pipe, real


def test_pictures_are_those_that_each_side_draws(finished):
    folder, _, pipe, _ = finished
    told = make_settings()
    options = {"steps": 2, "guidance": 2.0, "batch_size": 3}
    teacher = stable_diffusion()  # the same weights, never converted
    expected = {
        "teacher": generate(teacher, list(told.prompts), seeds=list(told.seeds), **options),
        "student": generate(pipe, list(told.prompts), seeds=list(told.seeds), **options),
        "teacher-other-seed": generate(
            teacher, list(told.prompts), seeds=list(told.other_seeds), **options
        ),
    }
    for side, images in expected.items():
        for i, image in enumerate(images):
            with Image.open(picture_of(folder, side, i)) as held:
                assert np.array_equal(np.asarray(held), np.asarray(image)), (side, i)
    assert not set(told.seeds) & set(told.other_seeds)


def test_every_number_is_there_and_holds_together(finished):
    folder, found, _, _ = finished
    told = json.loads((folder / "evaluation.json").read_text())
    assert told["schema"] == "convfusion-evaluation-1"
    assert told["settings"]["samples"] == 6 and told["settings"]["prompts"] == 3
    assert told["extractor"] == {
        "name": "thumbnails",
        "weights": thumbnails().weights,
        "side": 4,
        "features": 48,
    }
    assert told["real"]["samples"] == 7
    assert told["real"]["skipped"] == {
        "unreadable picture": 1,
        "picture smaller than the size asked for": 1,
    }
    pairs = [(row["pictures"], row["reference"]) for row in told["distributions"]]
    other = "teacher-other-seed"
    assert pairs[:2] == [("student", other), ("teacher", other)]
    assert pairs[2:] == [("student", "real"), ("teacher", "real"), (other, "real")]
    assert {row["pictures"]: row["samples"] for row in told["scores"]} == {
        "teacher": 6, "student": 6, other: 6, "real": 7,
    }  # fmt: skip
    assert [each["index"] for each in told["samples"]] == list(range(6))
    assert len(told["curves"]["steps"]) == len(told["curves"]["latent_errors"]) == 2
    mean = np.mean([each.epsilon_error for each in found.samples])
    assert mean == pytest.approx(np.mean(found.curves.epsilon_errors))
    assert found.curves.latent_errors_other_seed[-1] > found.curves.latent_errors[-1] > 0


def test_tables_say_what_the_json_says(finished):
    folder, found, _, _ = finished
    with open(folder / "samples.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["student_psnr"]) for row in rows] == [s.student.psnr for s in found.samples]
    with open(folder / "evaluation.csv", newline="", encoding="utf-8") as file:
        table = {(r["metric"], r["pictures"], r["reference"]): r for r in csv.DictReader(file)}
    row = table["frechet_distance", "student", "real"]
    assert float(row["value"]) == found.distributions[2].frechet
    assert (row["samples"], row["reference_samples"]) == ("6", "7")
    assert row["network"] == "thumbnails"
    assert table["class_score", "real", ""]["network"] == "thumbnails"
    floor = table["frechet_distance", "teacher", "teacher-other-seed"]
    assert float(floor["value"]) == found.distributions[1].frechet
    mean = table["psnr", "student", "teacher"]
    assert mean["network"] == ""
    values = [each.student.psnr for each in found.samples]
    assert float(mean["value"]) == pytest.approx(np.mean(values))
    means = np.mean([values[:3], values[3:]], axis=0)  # of each prompt's two pictures
    assert float(mean["standard_error"]) == pytest.approx(np.std(means, ddof=1) / 3**0.5)


def test_pairs_are_of_equal_seeds(finished):
    folder, found, _, _ = finished
    for each in found.samples:
        pair = [Image.open(picture_of(folder, s, each.index)) for s in ("student", "teacher")]
        assert each.student.psnr == psnr(*pair)
        assert each.seed == 5 + each.index


def test_errors_along_the_way_are_those_of_the_denoisers():
    """The recorded ε-errors, by hand; and nothing but the starting noise is shared at first."""
    pipe = student()
    teacher = attention_teacher(pipe.unet)
    with drawing_module.swapped_denoiser(pipe, teacher), recorded_latents(pipe, 2) as path:
        generate(pipe, PROMPTS[:2], steps=3, guidance=2.0)
    assert [t for t, _ in path] == pipe.scheduler.timesteps.tolist()
    assert "step" not in vars(pipe.scheduler)
    final = path[-1][1]
    told = make_settings(prompts=PROMPTS[:2], samples=2)
    found = drawing_module._measure_epsilon(pipe, teacher, told, final, range(2))
    noises = {950: torch.stack([drawing_module._make_noise(final[0], s, 950) for s in told.seeds])}
    start = torch.randn(final[:1].shape, generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(noises[950][:1], start)
    conditioning = encode_conditioning(pipe, PROMPTS[:2], (16, 16))
    by_hand = epsilon_errors(
        pipe.unet,
        teacher,
        noise_schedule(pipe.scheduler, pipe.unet),
        final,
        noises,
        conditioning,
    )
    assert [row[-1] for row in found] == pytest.approx(by_hand[0].tolist(), rel=1e-4)


def test_latents_that_were_recorded_are_those_of_the_picture():
    pipe = stable_diffusion()
    with recorded_latents(pipe, 1) as path:
        generate(pipe, ["green"], steps=3, guidance=2.0)
    latents = generate(pipe, ["green"], steps=3, guidance=2.0, output_type="latent")[0]
    torch.testing.assert_close(path[-1][1][0], latents)


def test_a_teacher_against_itself_has_no_distance(tmp_path):
    """Equal pictures have no PSNR; all that is left is the floor, which the student shares."""
    pipe = stable_diffusion()
    found = evaluate(
        pipe, make_settings(), tmp_path, extractor=thumbnails(), teacher=stable_diffusion()
    )
    assert all(each.student.psnr is None for each in found.samples)
    assert all(each.student.ssim == pytest.approx(1) for each in found.samples)
    assert all(each.epsilon_error == each.latent_error == 0 for each in found.samples)
    one, floor = found.distributions
    assert (one.frechet, one.kid, one.recall) == (floor.frechet, floor.kid, floor.recall)
    cells = re.findall(r"<td>([^<>]*)</td>", (tmp_path / "report.html").read_text())
    assert "equal" in cells and not any("nan" in cell or "inf" in cell for cell in cells)


@pytest.mark.parametrize("kind", ["sdxl", "pixart", "dit"])
def test_every_family_can_be_evaluated(kind, tmp_path):
    prompts = ["red", "green"]
    found = evaluate(
        student(kind),
        # The tiny DiT has no label of no class where its pipeline looks for one under guidance.
        make_settings(
            prompts=prompts, samples=2, batch_size=2, guidance=1.0 if kind == "dit" else 2.0
        ),
        tmp_path,
        extractor=thumbnails(),
    )
    assert all(np.isfinite(each.epsilon_error) and each.latent_error > 0 for each in found.samples)
    one = found.distributions[0]
    assert one.precision is None and one.kid_error is None  # two pictures have no five neighbours
    assert "2 pictures of 2 prompts are too few" in (tmp_path / "report.html").read_text()


class Killed(Exception):
    pass


def left_by_a_killed_process():
    """The name of a file that a process which has ended was writing."""
    command = [
        sys.executable,
        "-c",
        "from convfusion import folders; print(folders.unfinished_name())",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("moment", [5, 11, 22])
def test_a_killed_run_ends_in_the_same_bits(finished, tmp_path, monkeypatch, moment):
    """Killed while a file is written: what is left of it never counts.

    Settings are the first file, then nine pictures and a record for each of two batches, then what
    was found.
    """
    complete, _, _, real = finished
    write, written = files_module.write_bytes, []

    def killed(path, data):
        written.append(path)
        if len(written) == moment:
            path.with_name(left_by_a_killed_process()).write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, data)

    out = tmp_path / "out"
    options = {"extractor": thumbnails(), "real": open_real(str(real), (16, 16))}
    with monkeypatch.context() as patched:
        patched.setattr(files_module, "write_bytes", killed)
        with pytest.raises(Killed):
            evaluate(student(), make_settings(), out, **options)
    assert not (out / "evaluation.json").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("records/*.json")}
    evaluate(student(), make_settings(), out, **options)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert files(out) == files(complete)


def test_a_finished_run_draws_nothing_again(finished, monkeypatch):
    folder, _, pipe, real = finished
    before = files(folder)
    monkeypatch.setattr(drawing_module, "generate", None)
    done = []
    found = evaluate(
        pipe,
        make_settings(),
        folder,
        extractor=thumbnails(),
        real=open_real(str(real), (16, 16)),
        on_progress=lambda stage, count: done.append((stage, count)),
    )
    assert found is not None and files(folder) == before
    assert ("drawing", 6) in done


def test_a_picture_that_was_taken_away_or_changed_is_drawn_again(tmp_path):
    """And the pipeline is left as it was; and names on the page are text."""
    pipe = student()
    before = pipe.unet, fingerprint(pipe.unet), vars(pipe.scheduler).keys()
    told = make_settings(prompts=["<script>alert(1)</script>", "a & b"], samples=2)
    options = {"extractor": thumbnails(), "names": ("<b>student", "teacher")}
    evaluate(pipe, told, tmp_path, **options)
    written = files(tmp_path)
    picture_of(tmp_path, "student", 1).unlink()
    evaluate(pipe, told, tmp_path, **options)
    assert files(tmp_path) == written
    (tmp_path / "records" / "00000.json").write_text("{")
    evaluate(pipe, told, tmp_path, **options)
    assert files(tmp_path) == written
    path, record = picture_of(tmp_path, "student", 1), tmp_path / "records" / "00000.json"
    other = picture_of(tmp_path, "teacher", 1).read_bytes()  # whole, and of the same size
    for changed in (b"no picture", path.read_bytes()[:-30], other):
        path.write_bytes(changed)
        evaluate(pipe, told, tmp_path, **options)
        assert files(tmp_path) == written
    whole = json.loads(record.read_text())
    for values in (
        {"trajectory": [[1.0]]},
        {"epsilon_errors": "x"},
        {"samples": [0, 5]},
        {"pictures": 0},
    ):
        record.write_text(json.dumps(whole | values))
        evaluate(pipe, told, tmp_path, **options)
        assert files(tmp_path) == written
    assert (pipe.unet, fingerprint(pipe.unet)) == before[:2]
    assert vars(pipe.scheduler).keys() - before[2] <= {"num_inference_steps"}
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;student" in page


def test_one_process_at_a_time_writes_into_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ConvFusionError, match="is being written into by"):
        evaluate(student(), make_settings(), tmp_path, extractor=thumbnails())
    assert not list(tmp_path.iterdir())


def other_weights(pipe):
    with torch.no_grad():
        next(iter(mixers_of(pipe).values())).proj_out.bias.add_(0.1)


def other_scheduler(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=True)


OTHERS = {
    "steps": (lambda: (student(), make_settings(steps=3)), "steps 2"),
    "prompts": (lambda: (student(), make_settings(prompts=["red", "green", "apple"])), "prompts"),
    "seeds": (lambda: (student(), replace(make_settings(), seeds=tuple(range(6)))),
              "seeds"),
    "batches": (lambda: (student(), make_settings(batch_size=2)), "batch_size"),
    "weights": (lambda: (changed(other_weights), make_settings()), "weights.blocks .*student"),
    "scheduler": (lambda: (changed(other_scheduler), make_settings()),
                  "scheduler.clip_sample false"),
}  # fmt: skip


def changed(change):
    pipe = student()
    change(pipe)
    return pipe


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_another_run_is_refused(finished, case):
    folder = finished[0]
    before = files(folder)
    (pipe, told), name = OTHERS[case][0](), OTHERS[case][1]
    with pytest.raises(
        ConvFusionError, match=rf"begun with other settings \({name}.*\): choose another"
    ):
        evaluate(pipe, told, folder, extractor=thumbnails())
    assert files(folder) == before


def test_two_processes_share_the_drawing(finished, tmp_path, monkeypatch):
    """Each in an environment as a launcher sets it: the same bits as of one."""
    complete = finished[0]
    script, out = Path(__file__).parent / "two_evaluations.py", tmp_path / "out"
    second = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    running = subprocess.Popen([sys.executable, script, out], env=second, stderr=subprocess.PIPE)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def check(stage, done):
        assert not running.poll(), running.stderr.read().decode()

    found = evaluate(student(), make_settings(), out, extractor=thumbnails(), on_progress=check)
    running.communicate()
    assert found is not None and running.returncode == 0
    drawn, expected = files(out), files(complete)
    shared = [name for name in drawn if not name.startswith(("evaluation", "report"))]
    assert len(shared) == 18 + 2 + 2  # pictures, records, settings and samples
    for name in shared:  # the others tell of real pictures too
        assert drawn[name] == expected[name], name


def test_the_page_needs_no_other_file_and_shows_the_worst_first(finished):
    folder, found, _, _ = finished
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and 'src="data:image' in page
    assert "6 pictures with 48 features: a Fréchet distance is mostly bias" in page
    assert "thumbnails" in page and "FID" not in page
    by_prompt = {
        prompt: np.mean([s.student.psnr for s in found.samples if s.prompt == prompt])
        for prompt in PROMPTS
    }
    listed = page[page.index("the worst first") :]
    places = [listed.index(f"{p}<br>") for p in sorted(PROMPTS, key=by_prompt.get)]
    assert places == sorted(places)
