"""Whole pipelines as ONNX: the folder draws what the pipeline draws, or it is not written."""

import json
import runpy
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_models import randomise
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion import ConvFusionError, DeltaConv, imports, uniform
from convfusion.evaluate.images import psnr
from convfusion.export import export_pipeline, pipeline, tracing
from convfusion.export.int8 import quantise
from convfusion.generate import generate
from convfusion.surgery import mixers_of

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_generate.py"
PROMPTS = ["red apple", "Green APPLE "]
PARTS = {
    "sd": {"text_encoder", "tokenizer", "unet"},
    "sdxl": {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"},
    "pixart": {"text_encoder", "tokenizer", "transformer"},
}


@pytest.fixture(scope="module")
def example():
    """What the example defines."""
    return runpy.run_path(str(EXAMPLE))


DELTA = uniform(DeltaConv(kernel_size=3))
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}


def converted(kind, config=DELTA):
    pipe = PIPELINES[kind]()
    if kind in ("sd", "sdxl"):  # with fewer layers: each is traced
        pipe.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
            **(XL if kind == "sdxl" else {}),
        ).eval()
    convfusion.convert(pipe, config)
    randomise(mixers_of(pipe), std=0.1)
    return pipe


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """A PixArt exported once, in float32 and in int8, with weights in files of their own."""
    root, pipe = tmp_path_factory.mktemp("pixart"), converted("pixart")
    exact, less = root / "exact", root / "int8"

    def keep_and_quantise(path):
        shutil.copytree(path.parent.parent, exact)
        quantise(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "SINGLE_FILE", 1000)  # bytes; every part has more
        patch.setattr(pipeline, "quantise", keep_and_quantise)
        written = export_pipeline(pipe, less, guidance=4.0, steps=3, int8=True)
    shutil.copy(less / "pipeline.json", exact)
    return pipe, written, exact, less


@pytest.mark.parametrize("kind", PARTS)
def test_a_folder_draws_what_its_pipeline_draws(kind, example, request, tmp_path):
    if kind == "pixart":
        pipe, written, folder, _ = request.getfixturevalue("pixart")
    else:
        pipe, folder = converted(kind), tmp_path / "out"
        written = export_pipeline(pipe, folder, guidance=4.0, steps=3)
    assert len(written.errors) == 3 and max(written.errors.values()) < 1e-5
    index = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    found = {path.relative_to(folder) for path in folder.rglob("*.*")}
    assert {path.as_posix() for path in found} == set(index["files"])
    assert {path.parts[0] for path in found} == PARTS[kind] | {
        "vae_decoder",
        "scheduler",
        "pipeline.json",
    }

    drawer = example["Pipeline"](folder)
    assert 8 % index["size_unit"] == 0
    for size, negative in (((16, 24), None), ((24, 16), "apple")):
        latents = torch.randn(2, 4, *(side // index["pixels_per_latent"] for side in size))
        told = {} if negative is None else {"negative_prompt": [negative] * 2}
        expected = generate(
            pipe, PROMPTS, steps=3, guidance=4.0, size=size, latents=latents, **told
        )
        drawn = drawer.draw(PROMPTS, latents.numpy(), drawer.sampler(3), 4.0, negative)
        assert [picture.size for picture in drawn] == [size[::-1]] * 2
        assert min(map(psnr, drawn, expected)) >= 40
        assert psnr(*drawn) < 40  # the two pictures are not one


def test_int8_draws_nearly_the_same_with_weights_in_a_file_of_their_own(example, pixart):
    _, written, exact, less = pixart
    assert 0 < written.int8_error < 0.01
    weights = [folder / "transformer" / "model.onnx.data" for folder in (exact, less)]
    assert weights[1].stat().st_size < weights[0].stat().st_size
    index = json.loads((less / "pipeline.json").read_text(encoding="utf-8"))
    assert "transformer/model.onnx.data" in index["files"]

    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    drawers = [example["Pipeline"](folder) for folder in (exact, less)]
    drawn = [each.draw(["red apple"], noise, each.sampler(3), 4.0)[0] for each in drawers]
    assert 20 < psnr(*drawn) < float("inf")


SCHEDULERS = [
    ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "set_alpha_to_one": False}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_samplers_go_as_the_schedulers_of_diffusers_go(name, settings, steps, example):
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = getattr(diffusers, name)(**{**schedule, **settings})
    scheduler.set_timesteps(steps)
    sampler = example["SAMPLERS"][example["SCHEDULERS"][name]](
        json.loads(scheduler.to_json_string()), steps
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()

    def predict(noisy, time):
        return 0.5 * noisy + 0.3 * np.cos(noisy + float(time))

    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    mine, its = noise * sampler.start, torch.from_numpy(noise * float(scheduler.init_noise_sigma))
    for index, time in enumerate(scheduler.timesteps):
        mine = sampler.step(predict(sampler.scale(mine, index), time), mine, index)
        output = predict(scheduler.scale_model_input(its, time).numpy(), time)
        its = scheduler.step(torch.from_numpy(output), time, its).prev_sample
    assert np.abs(mine - its.numpy()).max() < 1e-3 * np.abs(mine).max()


def test_settings_that_the_example_does_not_follow_are_told(example):
    euler, ddim = example["SAMPLERS"]["euler"], example["SAMPLERS"]["ddim"]
    with pytest.raises(SystemExit, match=r"use_karras_sigmas True .* choose --sampler"):
        euler({"use_karras_sigmas": True}, 10)
    with pytest.raises(SystemExit, match="between two numbers"):
        euler({"timestep_spacing": "linspace"}, 20)
    with pytest.raises(SystemExit, match="predicts 'flow_prediction'"):
        ddim({"prediction_type": "flow_prediction"}, 10)
    with pytest.raises(SystemExit, match="rescale_betas_zero_snr"):
        ddim({"rescale_betas_zero_snr": True}, 10, own=False)
    with pytest.raises(SystemExit, match="--steps must be from 1"):
        ddim({"_class_name": "DDIMScheduler"}, 0)
    assert len(ddim({"_class_name": "PNDMScheduler", "solver_order": 3}, 4, own=False).timesteps)


def test_what_cannot_be_exported_as_a_whole_is_told_at_once(tmp_path, monkeypatch):
    out = tmp_path / "out"
    sd = converted("sd")
    with pytest.raises(ConvFusionError, match="not converted"):
        export_pipeline(stable_diffusion(), out)
    with pytest.raises(ConvFusionError, match="is a denoiser: export_onnx"):
        export_pipeline(sd.unet, out)
    with pytest.raises(ConvFusionError, match="draws one size only"):
        export_pipeline(converted("dit"), out)
    with pytest.raises(ConvFusionError, match="Img2ImgPipeline is not exported as a whole"):
        export_pipeline(diffusers.StableDiffusionImg2ImgPipeline(**sd.components), out)
    sd.vae.to(torch.bfloat16)
    with pytest.raises(ConvFusionError, match=r"its vae is in torch\.bfloat16"):
        export_pipeline(sd, out)
    monkeypatch.setattr(imports, "find_spec", lambda name: None)
    with pytest.raises(ConvFusionError, match=r"convfusion\[onnx\]"):
        export_pipeline(sd, out)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    out, pipe, told = tmp_path / "out", converted("sd"), {"unet": 1e-6}

    def write(pipe, readers, aside, on_part):
        (aside / "unet").mkdir()
        (aside / "unet" / "model.onnx").write_text(str(told["unet"]))
        return told

    monkeypatch.setattr(pipeline, "_write", write)
    export_pipeline(pipe, out)
    told["unet"] = float("nan")
    with pytest.raises(ConvFusionError, match="the exported unet is wrong by nan"):
        export_pipeline(pipe, out)
    assert (out / "unet" / "model.onnx").read_text() == "1e-06"
    told["unet"] = 2e-6
    export_pipeline(pipe, out)
    assert (out / "unet" / "model.onnx").read_text() == "2e-06"
    assert {path.name for path in out.iterdir()} == {"unet", "pipeline.json"}

    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConvFusionError, match=r"holds notes.txt: an export replaces"):
        export_pipeline(pipe, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_the_command_writes_the_folder(run, tmp_path, monkeypatch):
    def write(pipe, readers, aside, on_part):
        on_part("unet")
        return {"unet": 1e-6, "vae_decoder": 2e-6}

    monkeypatch.setattr(pipeline, "_write", write)
    convfusion.save_pipeline(converted("sd"), tmp_path / "model")
    status, out, err = run("export", tmp_path / "model", "--pipeline", "--out", tmp_path / "onnx")
    assert (status, err) == (0, "")
    assert "vae_decoder: differs from PyTorch by 2.0e-06" in out and "Written:" in out
    index = json.loads((tmp_path / "onnx" / "pipeline.json").read_text(encoding="utf-8"))
    assert (index["guidance"], index["steps"]) == (5.0, 25)
    status, _, err = run("export", "mini", "--pipeline", "--out", tmp_path / "model")
    assert status == 2 and "an export replaces a folder that it wrote" in err
    status, _, err = run("export", "mini", "--int8", "--out", tmp_path / "mini.onnx")
    assert status == 2 and "--int8 goes with --pipeline" in err
