"""ONNX files: they compute what PyTorch computes, at every size, or they are not written."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from PIL import Image
from tiny_models import dit, randomise

import convfusion
from convfusion import ConvFusionError, DeltaConv, export, imports, mini, uniform
from convfusion.export import denoiser
from convfusion.families import example_inputs, family_of
from convfusion.generate import generate
from convfusion.surgery import mixers_of


def unet() -> UNet2DConditionModel:
    """With SDXL's added conditions."""
    return UNet2DConditionModel(
        sample_size=6,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )


def pixart() -> PixArtTransformer2DModel:
    return tiny_models.pixart(num_layers=1)


def converted(make, **settings):
    torch.manual_seed(1)
    model = make().eval()
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3, **settings)))
    randomise(mixers_of(model), std=0.1)
    return model


@pytest.mark.parametrize("make", [unet, pixart])
def test_a_file_computes_what_the_model_computes_at_any_size(make, tmp_path):
    import onnxruntime

    model = converted(make)
    written = export.export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert len(written.errors) == 4 and max(written.errors.values()) < 1e-5
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    assert tuple(names) == written.inputs
    assert make is pixart or {"text_embeds", "time_ids"} <= set(names)

    unit = family_of(model).latent_unit(model)
    size = (7 * unit, 9 * unit)  # not among those that the export compares
    inputs = example_inputs(model, size, batch=4, words=5)
    with torch.no_grad():
        expected = model(**inputs)[0].numpy()
    flat = {**inputs, **inputs.get("added_cond_kwargs", {})}
    output = session.run(None, {name: flat[name].numpy() for name in names})[0]
    assert np.abs(output - expected).max() < 1e-5 * np.abs(expected).max()
    assert convfusion.status(model).sites[0].attention_kept  # the model itself is as it was
    check_description(session, model)
    assert str(denoiser.__file__).encode() not in written.path.read_bytes()  # nor other local paths


def check_description(session, model):
    """The free axes have names, and the metadata tell what the model and its inputs are."""
    family, inputs = family_of(model), {put.name: put for put in session.get_inputs()}
    latents = inputs[family.latents]
    assert latents.shape == ["batch", 4, "height", "width"]
    assert session.get_outputs()[0].shape[::2] == ["batch", "height"]
    assert session.get_outputs()[0].shape[3] == "width"
    assert inputs["timestep"].shape == ["batch"]
    assert inputs["encoder_hidden_states"].shape[:2] == ["batch", "words"]
    told = session.get_modelmeta().custom_metadata_map
    assert told["model"] == type(model).__name__
    assert told["size_unit"] == str(family.latent_unit(model))
    assert {name for name in told if name.startswith("input.")} == {f"input.{n}" for n in inputs}
    assert told[f"input.{family.latents}"] == family.input_docs[family.latents]


def test_the_script_of_the_page_draws_what_pytorch_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = mini.load_student("delta_conv")  # which takes less to trace
    export.export_onnx(pipe, "mini.onnx")
    page = (Path(__file__).parent.parent / "docs/export.md").read_text(encoding="utf-8")
    section = page.split("## Running the file")[1]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = (16 * scale, 24 * scale)
    expected = generate(pipe, ["red apple"], seeds=[0], steps=10, size=size)[0]
    with Image.open("apple.png") as drawn:
        difference = np.abs(np.asarray(drawn, float) - np.asarray(expected, float))
    assert difference.max() <= 2  # of 255


@pytest.mark.parametrize("difference", [0.5, float("nan"), float("inf")])
def test_a_file_that_is_wrong_is_not_kept(difference, tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "_write", lambda model, path: (path.write_text("new"),))
    monkeypatch.setattr(denoiser, "_measure_difference", lambda *_: difference)
    (tmp_path / "model.onnx").write_text("another")
    with pytest.raises(ConvFusionError, match="wrong by"):
        export.export_onnx(converted(pixart), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "another"
    assert len(list(tmp_path.iterdir())) == 1

    monkeypatch.setattr(denoiser, "_measure_difference", lambda *_: 1e-6)
    export.export_onnx(converted(pixart), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported_is_told_at_once(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    with pytest.raises(ConvFusionError, match="not converted"):
        export.export_onnx(unet(), path)
    with pytest.raises(ConvFusionError, match='pooling="ceil"'):
        export.export_onnx(converted(unet, pooling="adaptive"), path)
    with pytest.raises(ConvFusionError, match="draws one size only"):
        export.export_onnx(converted(dit), path)
    with pytest.raises(ConvFusionError, match="float32 on the CPU"):
        export.export_onnx(converted(unet).to(torch.bfloat16), path)
    with pytest.raises(ConvFusionError, match="must end in"):
        export.export_onnx(converted(unet), tmp_path / "model")
    monkeypatch.setattr(imports, "find_spec", lambda name: None)
    with pytest.raises(ConvFusionError, match=r"convfusion\[onnx\]"):
        export.export_onnx(converted(unet), path)
    assert not list(tmp_path.iterdir())
