"""Checkpoints: what comes back, and what damaged or foreign files do not do."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_models import CASES, randomise, run, sd15
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion import CheckpointError, ConvFusionError, DeltaConv, Removed, uniform
from convfusion.checkpoint import BLOCKS, MANIFEST
from convfusion.checkpoint.loading import in_dtype
from convfusion.checkpoint.manifests import public_name
from convfusion.checkpoint.pipelines import BARE
from convfusion.families import denoiser_of
from convfusion.files import read_tensors, write_tensors
from convfusion.generate import generate
from convfusion.surgery import mixers_of

pytestmark = pytest.mark.libraries


@pytest.fixture
def folder(tmp_path):
    model = sd15()
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    randomise(mixers_of(model))
    convfusion.save(model, tmp_path / "blocks")
    return tmp_path / "blocks"


def edit_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_tensors(folder, change):
    tensors = read_tensors(folder / BLOCKS)
    change(tensors)
    write_tensors(folder / BLOCKS, tensors)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"
NAME = f"{SITE}.mixer.proj_in.weight"

DAMAGE = {
    "truncated blocks": (lambda f: truncate(f / BLOCKS), "cannot be read"),
    "truncated manifest": (lambda f: truncate(f / MANIFEST), "cannot be read"),
    "no blocks": (lambda f: (f / BLOCKS).unlink(), "cannot be read"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no trained blocks"),
    "no safetensors": (lambda f: (f / BLOCKS).write_bytes(b"\x80\x04pickle"), "cannot be read"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "not a manifest of format 1"),
    "another format": (
        lambda f: edit_manifest(f, lambda m: m.update(format=2)),
        "not a manifest of format 1",
    ),
    "no sites": (lambda f: edit_manifest(f, lambda m: m.pop("sites")), "`sites` must map"),
    "another family": (
        lambda f: edit_manifest(f, lambda m: m.update(family="dit")),
        "for a dit model, and this is a unet",
    ),
    "an unknown mixer": (
        lambda f: edit_manifest(f, lambda m: m["sites"][SITE]["mixer"].update(kind="os.system")),
        "needs a kind",
    ),
    "a site too many": (
        lambda f: edit_manifest(f, lambda m: m["sites"].update({"x.attn1": m["sites"][SITE]})),
        "a site that this model lacks: x.attn1",
    ),
    "other channels": (
        lambda f: edit_manifest(f, lambda m: m["sites"][SITE].update(channels=320)),
        "16 channels here and 320 in the checkpoint",
    ),
    "a site without blocks": (
        lambda f: edit_tensors(f, lambda t: t.pop(NAME)),
        f"lacks {NAME}",
    ),
    "blocks without a site": (
        lambda f: edit_manifest(f, lambda m: m["sites"].pop(SITE)),
        "tensors of no site",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({NAME: torch.zeros(3, 3)})),
        r"shape \(3, 3\), expected \(8, 16\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@torch.no_grad()
def test_damage_is_named_and_leaves_the_model_alone(folder, damage):
    inflict, message = DAMAGE[damage]
    inflict(folder)
    case = CASES[0]
    model = case.model()
    expected = run(model, case, 24, 40)
    with pytest.raises(ConvFusionError, match=message):
        convfusion.load(model, folder)
    assert convfusion.status(model).converted == 0
    assert torch.equal(run(model, case, 24, 40), expected)
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    mixers = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConvFusionError):
        convfusion.load(model, folder)
    assert all(torch.equal(mixers[k], v) for k, v in model.state_dict().items())


def test_loading_over_another_conversion_is_refused(folder):
    model = sd15()
    convfusion.convert(model, uniform(Removed()))
    with pytest.raises(CheckpointError, match="converted otherwise"):
        convfusion.load(model, folder)


def test_saving_an_unconverted_model_is_refused(tmp_path):
    with pytest.raises(ConvFusionError, match="not converted"):
        convfusion.save(sd15(), tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()


def test_blocks_take_the_models_dtype(folder):
    model = sd15().to(torch.bfloat16)
    convfusion.load(model, folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_load_can_drop_the_attention(folder):
    model = sd15()
    convfusion.load(model, folder, keep_attention=False)
    assert not any(row.attention_kept for row in convfusion.status(model).sites)
    converted = sd15()
    convfusion.load(converted, folder)
    status = convfusion.load(converted, folder, keep_attention=False)
    assert not any(row.attention_kept for row in status.sites)


def draw(pipe):
    prompt, size, guidance = "green", (32, 32), 5.0
    if "DiT" in type(pipe).__name__:  # draws at its own size; a tiny one has no class 1000
        prompt, size, guidance = "1", None, 1.0
    images = generate(pipe, [prompt], steps=2, guidance=guidance, size=size)
    return np.asarray(images[0]).astype(int)


def test_the_names_of_classes_are_saved(tmp_path):
    pipe = PIPELINES["dit"]()
    convfusion.convert(pipe)
    convfusion.save_pipeline(pipe, tmp_path / "pipe")
    loaded = convfusion.load_pipeline(tmp_path / "pipe")
    assert loaded.labels == pipe.labels == {"red": 0, "green": 1, "apple": 2}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_whole_pipeline_draws_the_same_from_disk(tmp_path, family, keep):
    fresh = PIPELINES[family]()
    fresh.save_pretrained(tmp_path / "base")
    pipe = type(fresh).from_pretrained(tmp_path / "base")
    base = draw(pipe)
    convfusion.convert(pipe)
    randomise(mixers_of(pipe))
    if not keep:
        convfusion.drop_attention(pipe)
    expected = draw(pipe)
    assert abs(expected - base).max() > 1
    convfusion.save_pipeline(pipe, tmp_path / "pipe")
    loaded = convfusion.load_pipeline(tmp_path / "pipe")
    assert (draw(loaded) == expected).all()
    assert convfusion.status(loaded) == convfusion.status(pipe)
    if keep:
        convfusion.revert(loaded)
        assert (draw(loaded) == base).all()
        stock = type(pipe).from_pretrained(tmp_path / "pipe")
        assert (draw(stock) == base).all()
    else:
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            type(pipe).from_pretrained(tmp_path / "pipe")
        half = convfusion.load_pipeline(tmp_path / "pipe", **in_dtype(torch.bfloat16))
        convfusion.save_pipeline(half, tmp_path / "pipe")  # over itself, in half precision
        assert np.isfinite(draw(convfusion.load_pipeline(tmp_path / "pipe"))).all()
        assert {p.dtype for p in denoiser_of(half).parameters()} == {torch.bfloat16}


def test_a_manifest_tells_nothing_of_local_folders(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "secret" / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "secret" / "base")
    convfusion.convert(pipe)
    convfusion.save(pipe, tmp_path / "blocks")
    manifest = (tmp_path / "blocks" / MANIFEST).read_text()
    assert "secret" not in manifest
    assert json.loads(manifest)["base_model"] == "base"


def test_names_of_base_models():
    cached = "/home/me/.cache/huggingface/hub/models--stabilityai--sdxl-turbo/snapshots/1/unet"
    assert public_name(cached) == "stabilityai/sdxl-turbo"
    assert public_name("org/model") == "org/model"
    assert public_name("/gone/secret/base") == "base"
    assert public_name("") == ""


def test_a_meta_model_takes_its_own_dtype_and_has_nothing_to_save(folder, tmp_path):
    with torch.device("meta"):
        model = sd15().to(torch.bfloat16)
    convfusion.load(model, folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        empty = sd15()
    convfusion.convert(empty)
    with pytest.raises(ConvFusionError, match="no values to save"):
        convfusion.save(empty, tmp_path / "empty")


def test_a_damaged_pipeline_is_named(tmp_path):
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    convfusion.drop_attention(pipe)
    convfusion.save_pipeline(pipe, tmp_path / "pipe")
    truncate(tmp_path / "pipe" / "unet" / BARE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convfusion.load_pipeline(tmp_path / "pipe")
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        convfusion.load_pipeline(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "convfusion")
    with pytest.raises(CheckpointError, match="no converted pipeline"):
        convfusion.load_pipeline(tmp_path / "pipe")
    with pytest.raises(ConvFusionError, match="takes a pipeline"):
        convfusion.save_pipeline(pipe.unet, tmp_path / "unet")
