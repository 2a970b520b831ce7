"""What a UNet shares with the motion UNet that is made of it, and with its ControlNet."""

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    UNetMotionModel,
)
from PIL import Image
from tiny_models import controlnet, motion, randomise
from tiny_pipelines import animate_diff, stable_diffusion

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.bench.counts import operation_table
from convfusion.bench.models import BenchModel
from convfusion.export import export_onnx
from convfusion.families import denoiser_of, example_inputs
from convfusion.generate import generate
from convfusion.operations import site_operations
from convfusion.surgery import mixers_of


def motion_of(unet) -> UNetMotionModel:
    """A motion UNet around an image UNet whose layers over time change nothing."""
    model = UNetMotionModel.from_unet2d(unet, load_weights=True)
    for name, module in model.named_modules():
        if name.endswith("proj_out") and "motion_modules" in name:
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model.eval()


@torch.no_grad()
def test_blocks_of_an_image_unet_draw_the_same_on_each_frame(tmp_path):
    unet = stable_diffusion().unet
    model = motion_of(unet)
    convfusion.convert(unet, uniform(DeltaConv(kernel_size=3)))
    randomise(mixers_of(unet))
    convfusion.save(unet, tmp_path / "blocks")
    convfusion.load(model, tmp_path / "blocks")
    inputs = example_inputs(unet, (8, 12), batch=3, words=5)
    frames = {**inputs, "sample": inputs["sample"].transpose(0, 1)[None]}
    frames["timestep"] = inputs["timestep"][:1]
    output = model(**frames)[0]
    torch.testing.assert_close(output[0].transpose(0, 1), unet(**inputs)[0])
    convfusion.save(model, tmp_path / "back")
    convfusion.revert(unet)
    convfusion.load(unet, tmp_path / "back")
    torch.testing.assert_close(output[0].transpose(0, 1), unet(**inputs)[0])


def test_blocks_of_other_widths_are_refused(tmp_path):
    unet = stable_diffusion().unet
    convfusion.convert(unet)
    convfusion.save(unet, tmp_path / "blocks")
    with pytest.raises(ConvFusionError, match=r"lacks|channels"):
        convfusion.load(motion(), tmp_path / "blocks")


@pytest.fixture
def animation() -> AnimateDiffPipeline:
    pipe = animate_diff()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: AnimateDiffPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_frames": 3, "num_inference_steps": 2, "height": 16, "width": 16}
    return pipe("red apple", generator=generator, output_type="pt", **options).frames


def test_an_animation_is_drawn_with_blocks_and_reverted(animation):
    before = draw(animation)
    assert convfusion.convert(animation).family == "motion_unet"
    randomise(mixers_of(animation))
    assert not torch.allclose(draw(animation), before, atol=1e-3)
    convfusion.revert(animation)
    assert torch.equal(draw(animation), before)


def test_what_an_animation_cannot_do_is_refused_in_one_line(animation, tmp_path):
    convfusion.convert(animation)
    with pytest.raises(ConvFusionError, match="draws videos"):
        generate(animation, ["red apple"])
    with pytest.raises(ConvFusionError, match="draws videos and is not exported"):
        export_onnx(animation, tmp_path / "x.onnx")


def test_every_frame_is_counted():
    image, video = stable_diffusion().unet, motion_of(stable_diffusion().unet)
    for model in (image, video):
        convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    one, sixteen = site_operations(image, (8, 8)), site_operations(video, (8, 8))
    assert sixteen == {path: (16 * a, 16 * b) for path, (a, b) in one.items()}
    tables = []
    for model in (image, video):
        convfusion.revert(model)
        tables.append(operation_table(BenchModel("own", model.to("meta"), 2), [(16, 16)]))
    assert [16 * row.operations for row in tables[0]] == [row.operations for row in tables[1]]


def test_a_pipeline_with_a_controlnet_converts_its_unet(tmp_path):
    stock = stable_diffusion()
    net = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    pipe = StableDiffusionControlNetPipeline(
        **stock.components, controlnet=net, requires_safety_checker=False
    )
    assert denoiser_of(pipe) is pipe.unet
    convfusion.convert(pipe)
    assert convfusion.status(net).converted == 0 < convfusion.status(pipe).converted
    assert convfusion.convert(pipe.controlnet).family == "controlnet"
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight)
    picture = Image.new("RGB", (16, 16), (200, 20, 20))
    drawn = generate(pipe, ["red apple"], steps=2, size=(16, 16), image=[picture])
    for part in (pipe, net):
        convfusion.revert(part)
    again = generate(pipe, ["red apple"], steps=2, size=(16, 16), image=[picture])
    assert drawn[0].tobytes() != again[0].tobytes()


def test_a_controlnet_is_not_exported(tmp_path):
    net = controlnet()
    convfusion.convert(net)
    with pytest.raises(ConvFusionError, match="a tensor for each layer"):
        export_onnx(net, tmp_path / "x.onnx")
