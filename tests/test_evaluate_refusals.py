"""What an evaluation refuses before it draws, and what it takes nevertheless."""

import json

import numpy as np
import pytest
import torch
from evaluations import make_settings, student, thumbnails
from PIL import Image
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion import ConvFusionError
from convfusion.data import LatentDataset
from convfusion.evaluate import EvaluationSettings, evaluate, plan_evaluation
from convfusion.evaluate.pair import teacher_denoiser
from convfusion.evaluate.real import decoded, open_real
from convfusion.fingerprint import fingerprint
from convfusion.surgery import attention_teacher, mixers_of


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConvFusionError, match="no evaluation: choose another folder"):
        evaluate(student(), make_settings(), tmp_path, extractor=thumbnails())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConvFusionError, match="is damaged"):
        evaluate(student(), make_settings(), tmp_path, extractor=thumbnails())


def unconverted():
    return stable_diffusion(), None


def dropped():
    pipe = student()
    convfusion.drop_attention(pipe)
    return pipe, None


def other_vae():
    teacher = stable_diffusion()
    torch.nn.init.zeros_(teacher.vae.post_quant_conv.weight)
    return student(), teacher


def other_text_encoder():
    teacher = stable_diffusion()
    torch.nn.init.zeros_(next(teacher.text_encoder.parameters()))
    return student(), teacher


def other_size():
    teacher = stable_diffusion()
    teacher.unet.register_to_config(sample_size=16)
    return student(), teacher


def other_channels():
    teacher = stable_diffusion()
    teacher.unet.register_to_config(in_channels=8)
    return student(), teacher


def other_schedule():
    teacher = stable_diffusion()
    teacher.scheduler = type(teacher.scheduler)(beta_end=0.03)
    return student(), teacher


def other_family():
    return student(), PIPELINES["pixart"]()


NO_TWINS = {
    unconverted: "not converted, so there is nothing to compare",
    dropped: "was dropped: give the original pipeline",
    other_vae: r"another vae \(weights \w+ in the teacher, \w+ here\)",
    other_text_encoder: r"another text encoder \(weights ",
    other_size: "latent size 8, and the teacher's 16",
    other_channels: "latent channels 4, and the teacher's 8",
    other_schedule: "other noise schedules",
    other_family: "a StableDiffusionPipeline cannot be compared with a PixArtSigmaPipeline",
}


@pytest.mark.parametrize("pair", NO_TWINS, ids=lambda pair: pair.__name__)
def test_no_twins_are_refused_before_anything_is_drawn(pair, tmp_path):
    pipe, teacher = pair()
    with pytest.raises(ConvFusionError, match=NO_TWINS[pair]):
        evaluate(pipe, make_settings(), tmp_path / "out", extractor=thumbnails(), teacher=teacher)
    assert not (tmp_path / "out").exists()


def test_a_student_without_attention_is_compared_with_the_original(tmp_path):
    pipe, _ = dropped()
    found = evaluate(
        pipe, make_settings(), tmp_path, extractor=thumbnails(), teacher=stable_diffusion()
    )
    own = student()
    assert found.model["weights"]["teacher"] == fingerprint(attention_teacher(own.unet))
    assert teacher_denoiser(own) is not own.unet


def test_what_is_not_finite_is_named(tmp_path):
    pipe = student()
    torch.nn.init.constant_(next(iter(mixers_of(pipe).values())).proj_out.bias, float("nan"))
    with pytest.raises(ConvFusionError, match="what student draws from the seeds 5 to 7 is not"):
        evaluate(pipe, make_settings(), tmp_path, extractor=thumbnails())


REAL = {
    "empty": ([], "has no pictures"),
    "broken": (["a.png", "b.jpg"], "none of the pictures of real can be used.*2× unreadable"),
}


@pytest.mark.parametrize("case", REAL)
def test_a_folder_without_real_pictures_is_refused(case, tmp_path):
    names, message = REAL[case]
    folder = tmp_path / "real"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(ConvFusionError, match=message):
        real = open_real(str(folder), (16, 16))
        evaluate(student(), make_settings(), tmp_path / "out", extractor=thumbnails(), real=real)
    assert not (tmp_path / "out").exists()


def test_real_pictures_come_from_data_sources_too(tmp_path):
    for name in ("red", "green"):
        Image.new("RGB", (20, 18), name).save(tmp_path / f"{name}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "text": n}) for n in ("red", "green")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    real = open_real(str(tmp_path), (16, 16))
    assert [image.getpixel((8, 8)) for image in real] == [(255, 0, 0), (0, 128, 0)]
    assert [image.size for image in real] == [(16, 16)] * 2


def test_held_out_latents_of_a_dit_are_decoded():
    pipe = student("dit")
    data = LatentDataset(torch.randn(3, 4, 16, 16), ["1", "2", "3"])
    found = list(decoded(pipe, data, "held out", (32, 32)))
    pixels = pipe.vae.decode(data.latents[:1] / pipe.vae.config.scaling_factor).sample
    assert len(found) == 3
    expected = (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).detach()
    drawn = torch.from_numpy(np.array(found[0])) / 255
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1 / 255)


def test_small_pictures_and_unknown_classes_are_refused(tmp_path):
    pipe = student()
    with pytest.raises(ConvFusionError, match="8×8 are too small"):
        evaluate(pipe, make_settings(size=(8, 8)), tmp_path / "out", extractor=thumbnails())
    with pytest.raises(ConvFusionError, match="80000×80000 are too large"):
        evaluate(pipe, make_settings(size=(80000, 80000)), tmp_path / "out", extractor=thumbnails())
    with pytest.raises(ConvFusionError, match="'cat' is no class"):
        evaluate(
            student("dit"),
            make_settings(prompts=["red", "cat"]),
            tmp_path / "out",
            extractor=thumbnails(),
        )
    with pytest.raises(ConvFusionError, match="with a guidance of 1 only"):
        labels = make_settings(prompts=["1", "2"], guidance=2.0)
        evaluate(student("dit"), labels, tmp_path / "out", extractor=thumbnails())
    with pytest.raises(ConvFusionError, match="1000 is beyond the last, 999"):
        evaluate(pipe, make_settings(timesteps=(5, 1000)), tmp_path / "out", extractor=thumbnails())
    with pytest.raises(ConvFusionError, match="multiples of 8"):
        evaluate(pipe, make_settings(size=(20, 16)), tmp_path / "out", extractor=thumbnails())
    assert not (tmp_path / "out").exists()


def test_samples_of_prompts():
    assert plan_evaluation(["a", "b", "c", "d"], 2, 7).prompts == ("b", "d")
    six = plan_evaluation(["a", "b", "c"], 6, 7)
    assert six.prompts == ("a", "b", "c", "a", "b", "c")
    assert six.seeds == (7, 8, 9, 10, 11, 12)
    assert set(six.other_seeds).isdisjoint(six.seeds)
    assert plan_evaluation(["a", "b"], None, 0).prompts == ("a", "b")
    for prompts, samples, message in (
        ([], None, "no prompts"),
        (["a", "b", "c"], 4, "give 6 samples, or up to 3"),
        (["a"], 1, "1 samples tell nothing"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            plan_evaluation(prompts, samples, 0)
    for fields, message in (
        ({"prompts": ("a", "b"), "seeds": (0, 1), "timesteps": ()}, "at least one is needed"),
        ({"prompts": ("a", "b"), "seeds": (1,)}, "2 prompts and 1 seeds"),
        ({"prompts": ("a", "a"), "seeds": (1, 1)}, "drawn twice"),
        ({"prompts": ("a", "b"), "seeds": (-1, 1)}, "0 or more"),
        ({"prompts": ("a", "b"), "seeds": (0, 1), "steps": 0}, "at least 1"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            EvaluationSettings(**fields)
