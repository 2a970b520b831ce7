"""What goes into a distillation: losses, latents, captions and batches."""

import pytest
import torch
from PIL import Image
from tiny_pipelines import PIPELINES, stable_diffusion

from convfusion import ConvFusionError
from convfusion.conditioning import class_labels, encode_conditioning
from convfusion.distill import (
    read_image_folder,
)
from convfusion.distill.data import StepSampler, encode_pictures, load_picture
from convfusion.distill.losses import feature_loss, min_snr_weight, weighted_mse
from convfusion.schedule import add_noise, as_epsilon


def test_losses_equal_their_formulas():
    schedule = torch.linspace(0.999, 0.01, 1000)
    steps = torch.tensor([0, 500, 999])
    snr = schedule[steps] / (1 - schedule[steps])
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(min_snr_weight(schedule, steps, 5.0), expected)
    one, other = torch.randn(2, 3, 4, 5, 5).unbind()
    by_hand = sum(w * (a - b).pow(2).mean() for w, a, b in zip(expected, one, other, strict=True))
    torch.testing.assert_close(weighted_mse(one, other, expected), by_hand / 3)
    features = feature_loss({"a": one, "b": other}, {"a": other, "b": other + 1})
    torch.testing.assert_close(features, (one - other).pow(2).mean() + 1)


def test_velocity_and_learned_variance_become_epsilon():
    schedule = torch.linspace(0.99, 0.01, 1000)
    steps = torch.tensor([10, 700])
    signal = schedule[steps].view(-1, 1, 1, 1)
    clean, noise = torch.randn(2, 2, 4, 6, 6).unbind()
    noisy = add_noise(clean, noise, steps, schedule)
    torch.testing.assert_close(noisy, signal.sqrt() * clean + (1 - signal).sqrt() * noise)
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    found = as_epsilon(velocity, noisy, steps, schedule, "v_prediction")
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-5)
    with_variance = torch.cat([noise, torch.randn_like(noise)], dim=1)
    assert torch.equal(as_epsilon(with_variance, noisy, steps, schedule, "epsilon"), noise)
    with pytest.raises(ConvFusionError, match="'sample' is not supported"):
        as_epsilon(noise, noisy, steps, schedule, "sample")


def test_batches_depend_on_seed_and_step_alone():
    straight = list(StepSampler(10, 4, 0, 0, 10))
    assert list(StepSampler(10, 4, 0, 6, 10)) == straight[6:]
    assert sorted(i for batch in straight[:5] for i in batch) == sorted([*range(10)] * 2)
    assert list(StepSampler(10, 4, 1, 0, 10)) != straight


def test_image_folder(tmp_path):
    pipe = stable_diffusion()
    for name, size in (("a.png", (20, 40)), ("b.jpg", (64, 16))):
        Image.new("RGB", size, "red").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"red {name[0]}\n")
    samples = read_image_folder(tmp_path)
    assert [caption for _, caption in samples] == ["red a", "red b"]
    picture = load_picture(samples[0][0], (16, 24))
    assert picture.shape == (3, 16, 24)
    assert torch.equal(picture[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    latents = encode_pictures(pipe.vae, [path for path, _ in samples], (16, 24))
    assert latents.shape == (2, 4, 8, 12)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConvFusionError, match=r"b.jpg has no caption: b.txt"):
        read_image_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConvFusionError, match="cannot be read as a picture"):
        load_picture(tmp_path / "a.png", (16, 16))
    with pytest.raises(ConvFusionError, match="is not a folder"):
        read_image_folder(tmp_path / "nowhere")


def test_a_dropped_caption_is_what_sdxl_sees_without_a_negative_prompt():
    pipe = PIPELINES["sdxl"]()
    found = encode_conditioning(pipe, ["red", ""], (32, 32))
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt("red", device="cpu")
    torch.testing.assert_close(
        found["encoder_hidden_states"], torch.cat([embeds, negative]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found["added_cond_kwargs"]["text_embeds"],
        torch.cat([pooled, negative_pooled]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_class_labels_are_checked():
    pipe = PIPELINES["dit"]()
    assert class_labels(pipe, ["green", "7", ""]) == [1, 7, 10]
    for wrong in ("blue", "11", "²"):
        with pytest.raises(ConvFusionError, match="no class of this model"):
            class_labels(pipe, [wrong])


def test_pictures_are_upright_and_on_white(tmp_path):
    turned = Image.new("RGBA", (8, 16), (255, 0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_picture(tmp_path / "a.png", (8, 16)), torch.ones(3, 8, 16))
