"""What is saved can be read back; what could not is refused by name, before anything is written."""

import copy
import os
import signal

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import CASES, sd15
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion import CheckpointError, ConvFusionError, DeltaConv, checkpoint, uniform
from convfusion.checkpoint import BLOCKS, MANIFEST, blocks
from convfusion.families import denoiser_of
from convfusion.files import read_tensors, write_tensors
from convfusion.surgery import mixers_of

SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"


def converted():
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    return pipe


def with_lora_in_the_text_encoder(pipe):
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def with_a_layer_more(pipe):
    pipe.vae.decoder.extra = torch.nn.Linear(2, 2)


def with_a_wider_layer(pipe):
    pipe.vae.post_quant_conv = torch.nn.Conv2d(4, 8, 1)


def with_a_component_of_ones_own(pipe):
    class Own(type(pipe.scheduler)):
        pass

    pipe.scheduler = Own.from_config(pipe.scheduler.config)


def without_values(pipe):
    pipe.vae.to("meta")


def quantised(pipe):
    class Packed(torch.Tensor):
        pass

    weight = pipe.unet.conv_in.weight
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight.detach().as_subclass(Packed))


def fused(pipe):
    pipe.fuse_qkv_projections()


REFUSED = {
    "a LoRA on the text encoder": (with_lora_in_the_text_encoder, "LoRA is loaded in text_encoder"),
    "a layer more": (with_a_layer_more, "vae has tensors that its config does not ask for"),
    "a wider layer": (with_a_wider_layer, "vae is not what its config describes"),
    "a class of one's own": (with_a_component_of_ones_own, "is no component of diffusers"),
    "no values": (without_values, "vae has no values"),
    "quantised weights": (quantised, "unet is quantised, at conv_in.weight"),
    "fused projections": (fused, "unfuse_qkv_projections"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_read_back_is_refused_by_name(name, tmp_path):
    change, message = REFUSED[name]
    pipe = converted()
    change(pipe)
    with pytest.raises(ConvFusionError, match=message):
        convfusion.save_pipeline(pipe, tmp_path / "X")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", PIPELINES)
def test_a_converted_denoiser_refuses_save_pretrained_until_it_is_reverted(family, tmp_path):
    pipe = PIPELINES[family]()
    convfusion.convert(pipe)
    model = denoiser_of(pipe)
    for each in (pipe, model, copy.deepcopy(model)):
        with pytest.raises(ConvFusionError, match=r"convfusion\.save_pipeline"):
            each.save_pretrained(tmp_path / "X")
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ConvFusionError, match=r"convfusion\.save_pipeline"):
            each.push_to_hub("me/model")
    convfusion.revert(pipe)
    assert "save_pretrained" not in vars(model)
    pipe.save_pretrained(tmp_path / "stock")
    type(pipe).from_pretrained(tmp_path / "stock")


def test_dropped_loaded_and_reused_ones_refuse_it_too(tmp_path):
    convfusion.save(converted(), tmp_path / "blocks")
    model = stable_diffusion().unet
    convfusion.load(model, tmp_path / "blocks", keep_attention=False)
    with pytest.raises(ConvFusionError, match="revert it first"):
        model.save_pretrained(tmp_path / "X")
    with pytest.raises(ConvFusionError, match="revert it first"):
        type(stable_diffusion())(
            **{**stable_diffusion().components, "unet": model}, requires_safety_checker=False
        ).save_pretrained(tmp_path / "X")


def test_what_another_library_put_in_place_of_save_pretrained_comes_back():
    model = sd15()
    model.save_pretrained = own = print
    convfusion.convert(model)
    assert model.save_pretrained is not own
    convfusion.revert(model)
    assert model.save_pretrained is own


def poisoned(value):
    model = sd15()
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    with torch.no_grad():
        mixers_of(model)[SITE].proj_in.weight[0, 0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_blocks_that_are_not_finite_are_neither_saved_nor_loaded(value, tmp_path):
    with pytest.raises(ConvFusionError, match=rf"{SITE}\.mixer\.proj_in\.weight.*NaN or infinite"):
        convfusion.save(poisoned(value), tmp_path / "X")
    assert not (tmp_path / "X").exists()
    convfusion.save(poisoned(0.0), tmp_path / "X")
    tensors = read_tensors(tmp_path / "X" / BLOCKS)
    tensors[f"{SITE}.mixer.proj_in.weight"][0, 0] = value
    digest = write_tensors(tmp_path / "X" / BLOCKS, tensors)
    manifest = (tmp_path / "X" / MANIFEST).read_text().splitlines()
    lines = [f'  "sha256": "{digest}",' if '"sha256"' in line else line for line in manifest]
    (tmp_path / "X" / MANIFEST).write_text("\n".join(lines))
    model = sd15()
    with pytest.raises(CheckpointError, match=r"proj_in\.weight has NaN or infinite values"):
        convfusion.load(model, tmp_path / "X")
    assert convfusion.status(model).converted == 0


def test_values_that_float16_cannot_hold_are_refused_there(tmp_path):
    convfusion.save(poisoned(1e6), tmp_path / "X")
    convfusion.load(sd15(), tmp_path / "X")
    with pytest.raises(CheckpointError, match=r"beyond what torch\.float16 can hold"):
        convfusion.load(sd15().half(), tmp_path / "X")


def test_blocks_with_a_lora_in_them_are_not_saved(tmp_path):
    model = sd15()
    convfusion.convert(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*mixer\.proj_in"), model)
    with pytest.raises(ConvFusionError, match=r"proj_in has a LoRA"):
        convfusion.save(model, tmp_path / "X")


def test_blocks_in_a_dtype_that_is_not_read_are_not_saved(tmp_path):
    model = sd15()
    convfusion.convert(model)
    mixers_of(model)[SITE].to(torch.float8_e4m3fn)
    with pytest.raises(ConvFusionError, match="stored as float8_e4m3fn: save blocks before"):
        convfusion.save(model, tmp_path / "X")


def test_new_tensors_under_an_old_manifest_are_refused(tmp_path):
    model = CASES[0].model()
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3, gate="scaled")))
    convfusion.save(model, tmp_path)
    convfusion.revert(model)
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3, gate="sigmoid"), seed=1))
    child = os.fork()
    if child == 0:
        blocks.write_text = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        convfusion.save(model, tmp_path)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(CheckpointError, match="the writing of it was cut short"):
        convfusion.load(sd15(), tmp_path)
    with pytest.raises(CheckpointError, match="the writing of it was cut short"):
        checkpoint.push(tmp_path, "me/blocks")
    convfusion.save(model, tmp_path)
    convfusion.load(sd15(), tmp_path)
