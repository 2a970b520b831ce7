"""Made-up inputs are those that a pipeline would give, for the odd denoisers too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    PixArtTransformer2DModel,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from tiny_models import CASES
from tiny_pipelines import stable_diffusion, stable_diffusion_xl, text_config
from transformers import CLIPTextModelWithProjection

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.data import cache
from convfusion.data.cache import build_cache
from convfusion.data.latents import LatentDataset
from convfusion.data.sources import Prompts
from convfusion.distill import DistillConfig, distill
from convfusion.export import export_onnx
from convfusion.families import encode_conditioning, example_inputs
from convfusion.families.unet import count_time_ids
from convfusion.highres.peaks import estimate_denoiser_peak
from convfusion.highres.savings import choose_savings, run_one_at_a_time

TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
REFINER = {**TIME, "projection_class_embeddings_input_dim": 16 + 5 * 8}
ODD = {
    "refiner": REFINER,
    "Kolors": {
        **TIME,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "text_proj",
    },
    "LCM": {"time_cond_proj_dim": 12},
    "unCLIP": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "simple projection": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 20,
    },
    "identity": {"class_embed_type": "identity"},
    "timestep": {"class_embed_type": "timestep"},
    "upscaler": {"num_class_embeds": 10, "in_channels": 7},
    "inpainting": {"in_channels": 9},
    "text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "widths in a list": {"cross_attention_dim": [16, 16]},
}


def unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    stock = dict(stable_diffusion().unet.config)
    stock["_use_default_values"] = []  # diffusers sets those to their defaults again
    return UNet2DConditionModel.from_config({**stock, **options}).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ODD)
def test_odd_unets_get_what_their_pipelines_give(name):
    model = unet(**ODD[name])
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    inputs = example_inputs(model, (8, 8), batch=2)
    whole = model(**inputs)[0]
    assert whole.shape == (2, 4, 8, 8)
    with run_one_at_a_time(model):
        assert torch.allclose(model(**inputs)[0], whole, atol=1e-5)
    assert estimate_denoiser_peak(model, (8, 8)) > 0


def test_the_refiner_is_told_five_numbers():
    assert count_time_ids(unet(**REFINER)) == 5
    assert count_time_ids(unet(**ODD["Kolors"])) == 6
    assert count_time_ids(next(case for case in CASES if case.name == "sdxl").model()) == 6


def test_the_export_takes_all_inputs_of_a_refiner_and_an_lcm(tmp_path):
    model = unet(**REFINER, time_cond_proj_dim=12)
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    written = export_onnx(model, tmp_path / "both.onnx")
    assert {"time_ids", "text_embeds", "timestep_cond"} <= set(written.inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert (shapes["time_ids"][1], shapes["timestep_cond"][1]) == (5, 12)


@torch.no_grad()
def test_pixart_with_conditions_that_its_config_leaves_open():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=24, sample_size=128, patch_size=2, caption_channels=12,
    )  # fmt: skip
    inputs = example_inputs(model, (8, 8), batch=2, words=5)
    assert inputs["added_cond_kwargs"]["resolution"].shape == (2, 2)
    assert model(**inputs)[0].shape == (2, 8, 8, 8)


def with_ip_adapter(pipe: Any, wide: int = 12) -> Any:
    """A pipeline with the smallest IP-Adapter there is."""
    text, state = pipe.unet.config.cross_attention_dim, {}
    for i, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            channels = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for key in ("to_k_ip", "to_v_ip"):
                state[f"{i}.{key}.weight"] = torch.randn(channels, text)
    projection = {
        "proj.weight": torch.randn(4 * text, wide),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": state},
        subfolder="", weight_name="", image_encoder_folder=None,
    )  # fmt: skip
    return pipe


@torch.no_grad()
def test_an_ip_adapter_gets_its_pictures_and_is_not_exported(tmp_path):
    pipe = with_ip_adapter(stable_diffusion())
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    inputs = example_inputs(pipe.unet, (8, 8), batch=2)
    [pictures] = inputs["added_cond_kwargs"]["image_embeds"]
    assert pictures.shape == (2, 1, 12)
    whole = pipe.unet(**inputs)[0]
    with run_one_at_a_time(pipe.unet):
        assert torch.allclose(pipe.unet(**inputs)[0], whole, atol=1e-5)
    assert choose_savings(pipe, (32, 32), 4.0, batch=2).gib > 0
    with pytest.raises(ConvFusionError, match="unload_ip_adapter"):
        export_onnx(pipe, tmp_path / "x.onnx")


def test_what_is_not_known_is_refused_by_name():
    model = unet()
    for name, value in (
        ("addition_embed_type", "image_hint"),
        ("encoder_hid_dim_type", "image_proj"),
        ("class_embed_type", "sound"),
        ("cross_attention_dim", (16, 32)),
    ):
        before = model.config[name]
        model.register_to_config(**{name: value})
        with pytest.raises(ConvFusionError, match=name):
            estimate_denoiser_peak(model, (8, 8))
        model.register_to_config(**{name: before})
    pipe = stable_diffusion()
    pipe.controlnet = torch.nn.Linear(1, 1)
    with pytest.raises(ConvFusionError, match="beside the denoiser"):
        choose_savings(pipe, (32, 32), 4.0, batch=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_channels": 9}, "takes 9 channels"),
        ({"num_class_embeds": 10}, "class labels"),
        ({"time_cond_proj_dim": 12}, "latent consistency"),
    ],
)
def test_denoisers_that_are_told_more_than_captions_are_refused_first(options, said, tmp_path):
    pipe = stable_diffusion()
    pipe.unet.register_to_config(**options)
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("work was begun"))
    data, source = (
        LatentDataset(torch.zeros(2, 4, 8, 8), ["red", "green"]),
        Prompts("list", ("red",)),
    )
    with pytest.raises(ConvFusionError, match=said):
        encode_conditioning(pipe, ["red"], (16, 16))
    with pytest.raises(ConvFusionError, match=said):
        distill(pipe, data, DistillConfig(steps=1))
    with pytest.raises(ConvFusionError, match=said):
        build_cache(pipe, source, tmp_path / "cache")


def test_a_refiner_is_encoded_with_its_one_text_encoder_and_five_numbers():
    stock = stable_diffusion_xl()
    parts = {**stock.components, "text_encoder": None, "tokenizer": None}
    parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(16)).eval()
    parts["unet"] = unet(**REFINER)
    pipe = StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )
    found = encode_conditioning(pipe, ["red", "green"], (16, 24))
    assert found["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 6]] * 2
    noise = torch.randn(2, 4, 8, 12)
    assert pipe.unet(noise, 5, **found).sample.shape == noise.shape
    assert {"vae", "text encoder 2"} <= cache._identify_parts(pipe).keys()
