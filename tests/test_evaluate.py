"""Distances, operation counts and drawing, against closed forms."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.evaluate import epsilon_error, psnr, relative_error
from convfusion.generate import check_size, generate
from convfusion.operations import operations_ratio, site_operations
from convfusion.surgery import attention_teacher

pytestmark = pytest.mark.libraries


def test_psnr_of_a_constant_difference():
    one = Image.new("RGB", (4, 4), (10, 20, 30))
    other = Image.new("RGB", (4, 4), (15, 25, 35))
    assert psnr(one, other) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(one, one) == float("inf")


def test_relative_error_of_a_scaled_output():
    teacher = torch.randn(3, 4, 5, 6)
    scales = torch.tensor([1.0, 1.5, 0.0]).view(-1, 1, 1, 1)
    expected = torch.tensor([0.0, 0.25, 1.0], dtype=torch.double)
    torch.testing.assert_close(relative_error(teacher * scales, teacher), expected)


@torch.no_grad()
def test_epsilon_error_is_zero_against_itself_and_grows_with_the_change():
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    latents, prompts = torch.randn(3, 4, 8, 8), ["red", "green", ""]
    assert epsilon_error(pipe, pipe.unet, latents, prompts, timesteps=(10, 900)) == 0
    teacher = attention_teacher(pipe.unet)
    small = epsilon_error(pipe, teacher, latents, prompts, timesteps=(10, 900))
    assert small > 0
    split = epsilon_error(pipe, teacher, latents, prompts, timesteps=(10, 900), batch_size=2)
    assert split == pytest.approx(small, rel=1e-4)
    for mixer in convfusion.surgery.mixers_of(pipe).values():
        mixer.proj_out.bias.add_(1.0)
    assert epsilon_error(pipe, teacher, latents, prompts, timesteps=(10, 900)) > small


def test_operation_counts_equal_formulas_worked_out_by_hand():
    pipe = stable_diffusion()
    kernel, stages = 5, 2
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=kernel, stages=stages)))
    counts = site_operations(pipe, (8, 12))
    for row in convfusion.status(pipe).sites:
        c, level = row.site.channels, row.site.level
        height, width = 8 // 2**level, 12 // 2**level
        n, inner = height * width, c // 2
        attention = 2 * n * c * c * 4 + 2 * 2 * n * n * c
        block = 2 * n * c * inner  # proj_in
        block += 2 * kernel**2 * inner * (n + n // 4)  # depthwise, at both scales
        block += 2 * n * (inner // 2 * stages) * c  # proj_out
        block += 2 * c * c  # the mean branch
        assert counts[row.site.path] == (attention, block)
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    assert operations_ratio(pipe, (8, 12)) == pytest.approx(total[0] / total[1])


def test_operation_counts_need_both_sides():
    pipe = stable_diffusion()
    with pytest.raises(ConvFusionError, match="not converted"):
        operations_ratio(pipe, (8, 8))
    convfusion.convert(pipe)
    convfusion.drop_attention(pipe)
    with pytest.raises(ConvFusionError, match="dropped"):
        operations_ratio(pipe, (8, 8))


def test_a_picture_depends_on_prompt_and_seed_alone():
    pipe = stable_diffusion()
    prompts = ["red apple", "green", "apple"]
    together = generate(pipe, prompts, steps=2, size=(16, 16))
    alone = generate(pipe, ["green"], seeds=[1], steps=2, size=(16, 16))[0]
    difference = np.abs(np.asarray(together[1], int) - np.asarray(alone, int))
    assert difference.max() <= 1  # rounding to 8 bits
    assert generate(pipe, prompts, steps=2, size=(16, 16), batch_size=1)[2].size == (16, 16)


def test_bad_requests_are_named():
    pipe = stable_diffusion()
    with pytest.raises(ConvFusionError, match="2 prompts and 1 seeds"):
        generate(pipe, ["a", "b"], seeds=[1])
    for numbers, message in (
        ({"steps": 0}, "at least 1"),
        ({"steps": 1001}, "the noise schedule has 1000 timesteps"),
        ({"steps": 1000}, "the noise schedule has 1000 timesteps"),  # from 1000, not 999
        ({"guidance": float("nan")}, "guidance must be from 0 to 1000, not nan"),
        ({"guidance": -1.0}, "from 0 to 1000, not -1 .1 or less is none"),
        ({"seeds": [-1]}, "0 or more and below 2⁶⁴, not -1"),
        ({"seeds": [2**64]}, "0 or more and below 2⁶⁴"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            generate(pipe, ["a"], **numbers)
    with pytest.raises(ConvFusionError, match=r"multiples of 8; the nearest size is 24×16"):
        check_size(pipe, (15, 21))
    with pytest.raises(ConvFusionError, match="nearest size is 8×8"):
        check_size(pipe, (-8, 0))
