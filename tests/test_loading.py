"""Pipelines from folders: whole or refused, by whichever way they are loaded."""

import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from tiny_pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from transformers import CLIPConfig, CLIPImageProcessor

import convfusion
from convfusion import CheckpointError, ConvFusionError, UnsupportedModelError, mini
from convfusion.cli.models import open_pipeline
from convfusion.files import read_tensors

_CLASS = "HunyuanVideoTransformer3DModel"
UNKNOWN = {"_class_name": "HunyuanVideoPipeline", "transformer": ["diffusers", _CLASS]}


def by_name(folder):
    return open_pipeline(str(folder), "float32", "cpu")


LOADERS = {"python": convfusion.load_pipeline, "command line": by_name}


def with_safety_checker():
    pipe = stable_diffusion()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config=small,
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    pipe.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=CLIPImageProcessor(size=8, crop_size=8),
    )
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted pipeline with all kinds of components, its text encoder in shards."""
    pipe = with_safety_checker()
    convfusion.convert(pipe)
    folder = tmp_path_factory.mktemp("saved")
    convfusion.save_pipeline(pipe, folder / "converted")
    convfusion.revert(pipe)
    pipe.save_pretrained(folder / "stock")
    for name in ("converted", "stock"):
        (folder / name / "text_encoder" / "model.safetensors").unlink()
        pipe.text_encoder.save_pretrained(folder / name / "text_encoder", max_shard_size="40KB")
        assert len(list((folder / name / "text_encoder").glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(params=["converted by python", "converted by command line", "stock"])
def kind(request, saved, tmp_path):
    """A fresh copy of a pipeline, and what loads it."""
    name = request.param.split()[0]
    shutil.copytree(saved / name, tmp_path / "pipe")
    return tmp_path / "pipe", LOADERS["python" if "python" in request.param else "command line"]


def test_whole_ones_load(kind):
    folder, read = kind
    assert read(folder).safety_checker is not None


def weights(folder, part):
    return sorted((folder / part).glob("*.safetensors"))[-1]


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet", "safety_checker"])
@pytest.mark.parametrize("harm", ["renamed", "gone", "too many", "of another shape"])
def test_a_tensor_that_is_missing_or_foreign_is_named(kind, part, harm):
    folder, read = kind
    file = weights(folder, part)
    tensors = read_tensors(file)
    name = next(name for name in tensors if name.endswith("weight") and tensors[name].dim() > 1)
    if harm == "renamed":
        tensors[f"{name}x"] = tensors.pop(name)
    elif harm == "gone":
        del tensors[name]
    elif harm == "too many":
        tensors["another.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        read(folder)
    said = str(raised.value)
    assert str(folder / part) in said and "\n" not in said
    assert harm == "of another shape" or ("another" if harm == "too many" else name) in said


def test_names_that_published_files_carry_along_are_passed_over(saved, tmp_path):
    shutil.copytree(saved / "stock", tmp_path / "pipe")
    file = weights(tmp_path / "pipe", "unet")
    idle = {"embeddings.position_ids": torch.arange(3)}
    save_file({**read_tensors(file), **idle}, file, metadata={"format": "pt"})
    by_name(tmp_path / "pipe")


NESTED = '{"a":' + "[" * 900 + "]" * 900 + "}"
DAMAGE = {
    "a scheduler cut off": ("scheduler/scheduler_config.json", "["),
    "a scheduler of no use": ("scheduler/scheduler_config.json", '{"num_train_timesteps": "x"}'),
    "a scheduler without end": ("scheduler/scheduler_config.json", '{"num_train_timesteps": 1e12}'),
    "a scheduler that is a list": ("scheduler/scheduler_config.json", "[]"),
    "a tokenizer cut off": ("tokenizer/tokenizer.json", "{"),
    "a tokenizer that is empty": ("tokenizer/tokenizer.json", "{}"),
    "a tokenizer's config": ("tokenizer/tokenizer_config.json", "5"),
    "an autoencoder's config": ("vae/config.json", '{"block_out_channels": [1]}'),
    "values in values": ("vae/config.json", NESTED),
    "no UTF-8": ("vae/config.json", b"\xff\xfe{}"),
    "a text encoder's config": ("text_encoder/config.json", '{"hidden_size": "x"}'),
    "the denoiser's config": ("unet/config.json", '{"_class_name": "UNet2DConditionModel"}'),
    "a picture processor": ("feature_extractor/preprocessor_config.json", "{"),
    "weights cut off": ("vae/diffusion_pytorch_model.safetensors", b"\x08\0\0\0"),
    "shards that are none": ("text_encoder/model.safetensors.index.json", '{"weight_map": 1}'),
    "an index cut off": ("model_index.json", "{"),
    "an index of one unknown class": (
        "model_index.json",
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "x"]}',
    ),
    "an index of too little": (
        "model_index.json",
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
    ),
    "an index of an unknown pipeline": ("model_index.json", '{"_class_name": "x"}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(kind, damage):
    folder, read = kind
    name, text = DAMAGE[damage]
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConvFusionError) as raised:
        read(folder)
    said = str(raised.value)
    place = name.split("/")[0]
    assert said.startswith(str(folder / place)) and "\n" not in said
    assert "Hub" not in said


@pytest.mark.parametrize("name", ["vae", "tokenizer", "scheduler"])
def test_a_component_that_is_gone_is_named(kind, name):
    folder, read = kind
    shutil.rmtree(folder / name)
    with pytest.raises(CheckpointError, match=f"lacks the folder {name}"):
        read(folder)


def test_an_adapter_does_not_bring_its_base_from_elsewhere(kind):
    folder, read = kind
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="text_encoder is an adapter"):
        read(folder)


def test_components_given_by_hand_take_the_place_of_those_on_disk(saved):
    given = convfusion.load_pipeline(
        saved / "converted", safety_checker=None, requires_safety_checker=False
    )
    assert given.safety_checker is None


@pytest.mark.parametrize("ours", [True, False], ids=["converted", "stock"])
def test_a_pipeline_without_a_component_that_diffusers_wants_to_be_told_of_loads(ours, tmp_path):
    pipe = stable_diffusion_3()
    if ours:
        convfusion.convert(pipe)
        convfusion.save_pipeline(pipe, tmp_path / "pipe")
    else:
        pipe.save_pretrained(tmp_path / "pipe")
    found = (convfusion.load_pipeline if ours else by_name)(tmp_path / "pipe")
    assert found.text_encoder_3 is found.tokenizer_3 is None
    expected = pipe.transformer.state_dict()
    assert all(torch.equal(own, expected[k]) for k, own in found.transformer.state_dict().items())


def test_weights_of_one_variant_load(tmp_path):
    pipe = stable_diffusion_xl().to(torch.float16)
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16")
    pipe.vae.save_pretrained(tmp_path / "pipe" / "vae", variant="fp16", max_shard_size="10KB")
    assert (tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    found = by_name(tmp_path / "pipe")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(pipe, part).state_dict()
        state = getattr(found, part).state_dict()
        assert all(torch.equal(state[name], expected[name].float()) for name in expected)


def test_plain_weights_go_before_variants_and_one_must_be_told(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    folder = tmp_path / "pipe" / "unet"
    for variant in ("ema", "fp16"):
        shutil.copy(folder / "diffusion_pytorch_model.safetensors",
                    folder / f"diffusion_pytorch_model.{variant}.safetensors")  # fmt: skip
    by_name(tmp_path / "pipe")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the variants ema, fp16 and not in plain form"):
        by_name(tmp_path / "pipe")


def test_pickles_are_never_read(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: diffusion_pytorch_model\.safe"):
        by_name(tmp_path / "pipe")
    (tmp_path / "pipe/vae/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match=r"model\.bin is a pickle, which can run code"):
        by_name(tmp_path / "pipe")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ConvFusionError, match=r"must be a \.safetensors"):
        by_name(tmp_path / "model.ckpt")


def test_a_model_that_cannot_be_converted_is_refused_from_its_index(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(UNKNOWN))  # and there are no weights
    with pytest.raises(UnsupportedModelError, match=rf"{_CLASS}.*UNet2DCondition"):
        by_name(tmp_path)


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "StableCascadeDecoderPipeline"])
def test_others_are_refused_too(name, tmp_path):
    part = {"transformer": ["diffusers", "CogVideoXTransformer3DModel"]} if "X" in name else {}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, **part}))
    with pytest.raises(UnsupportedModelError, match=r"CogVideoXTransformer3DModel|no `unet` or"):
        by_name(tmp_path)


def test_a_name_on_the_hub_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    root = tmp_path / "hub" / "models--them--video"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("1" * 40)
    (root / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (root / "snapshots" / ("1" * 40) / "model_index.json").write_text(json.dumps(UNKNOWN))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delattr(diffusers.DiffusionPipeline, "download")
    with pytest.raises(UnsupportedModelError, match="them/video: its transformer is a Hun"):
        by_name("them/video")


def test_what_is_no_pipeline_says_what_it_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no pipeline: it has no model_index\.json"):
        by_name(tmp_path)
    pipe = mini.load_teacher()
    convfusion.convert(pipe)
    convfusion.save(pipe, tmp_path)
    with pytest.raises(ConvFusionError, match="holds trained blocks and no pipeline"):
        by_name(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder or file here"):
        by_name("not-there")
