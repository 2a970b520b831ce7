"""Losses, their gradients, and the loop: what moves, what stays, and what comes back."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny_models import CASES, DISTILLED, first_output, randomise
from tiny_pipelines import PIPELINES, block_weights, stable_diffusion

import convfusion
from convfusion import CheckpointError, ConvFusionError, DeltaConv, uniform
from convfusion.data import LatentDataset
from convfusion.distill import DistillConfig, DistillTask, LossWeights, distill
from convfusion.distill import trainer as trainer_module
from convfusion.distill.settings import read_settings
from convfusion.generate import generate
from convfusion.surgery import attention_teacher, mixers_of

pytestmark = pytest.mark.libraries

table = pytest.mark.parametrize("case", DISTILLED, ids=lambda case: case.name)


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    return pipe


@pytest.fixture
def data() -> LatentDataset:
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentDataset(latents, ["red apple", "green apple", "red", "green", "apple", ""])


def frozen(pipe) -> dict[str, torch.Tensor]:
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder}
    return {
        f"{part}.{name}": tensor.clone()
        for part, model in parts.items()
        for name, tensor in model.state_dict().items()
        if ".mixer." not in name
    }


@table
@torch.no_grad()
def test_teacher_shares_the_weights_and_keeps_its_attention(case):
    original = case.model()
    model = copy.deepcopy(original)
    convfusion.convert(model)
    randomise(mixers_of(model))
    teacher = attention_teacher(model)
    owned = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in owned for p in teacher.parameters())
    size = case.sizes[0]
    inputs = case.inputs(*size)
    assert torch.equal(first_output(teacher(**inputs)), first_output(original(**inputs)))
    assert convfusion.status(model).converted == case.sites


def test_a_perfect_student_has_no_loss_but_the_noise():
    """A student whose blocks are its attention again: the terms that compare vanish."""
    case = CASES[0]
    model = case.model()
    convfusion.convert(model, uniform(DeltaConv()))
    task = DistillTask(model, DDIMScheduler(), LossWeights(noise=1, feature=1))
    task.student = task.teacher
    inputs = case.inputs(24, 40)
    latents, timesteps = inputs["sample"], inputs["timestep"]
    conditioning = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    terms = task.losses(latents, torch.randn_like(latents), timesteps, conditioning).terms
    assert terms["distill"] == 0
    assert terms["feature"] == 0
    assert terms["noise"] > 0


def test_only_the_blocks_move(pipe, data):
    before, moving = frozen(pipe), block_weights(pipe)
    wanted = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    config = DistillConfig(steps=3, batch_size=4, losses=LossWeights(noise=1))
    result = distill(pipe, data, config)
    assert result.steps == 3 and not result.stopped
    assert set(result.losses) == {"distill", "noise", "feature"}
    after = frozen(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(moving[name], now) for name, now in block_weights(pipe).items())
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == wanted


def test_distillation_brings_the_student_closer(pipe, data):
    losses = []
    config = DistillConfig(
        steps=40,
        batch_size=6,
        learning_rate=1e-2,
        warmup=1,
        caption_drop=0,
        losses=LossWeights(noise=0, feature=0.1),  # the noise of a random teacher is no guide
    )
    distill(pipe, data, config, on_step=lambda step, terms: losses.append(terms["distill"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_accumulation_and_checkpointing_do_not_change_the_step(pipe, data):
    def trained(**options):
        torch.manual_seed(0)
        twin = stable_diffusion()
        convfusion.convert(twin, uniform(DeltaConv(kernel_size=3)))
        distill(twin, data, DistillConfig(steps=2, batch_size=4, warmup=1, **options))
        return block_weights(twin)

    plain = trained()
    for options in ({"accumulation": 2}, {"checkpointing": True}):
        for name, tensor in trained(**options).items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-5, msg=name)


def test_resumed_run_ends_in_the_same_bits(pipe, data, tmp_path):
    config = DistillConfig(steps=6, batch_size=4, save_every=2, validate_every=2)
    torch.manual_seed(0)

    def picture(pipe, step):
        return Image.new("RGB", (8, 8))

    straight, stopped, resumed = stable_diffusion(), stable_diffusion(), stable_diffusion()
    for each in (straight, stopped, resumed):
        convfusion.convert(each, uniform(DeltaConv(kernel_size=3)))
    distill(straight, data, config, tmp_path / "straight", validate=picture)

    def interrupt(step, terms):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = distill(stopped, data, config, tmp_path / "run", on_step=interrupt)
    assert result.stopped and result.steps == 3
    result = distill(resumed, data, config, tmp_path / "run", resume=True)
    assert result.steps == 6 and not result.stopped
    expected = block_weights(straight)
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in block_weights(resumed).items()
    )
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-0000004", "step-0000006"]
    assert (tmp_path / "straight" / "validation" / "step-0000002.png").is_file()
    assert list((tmp_path / "straight").rglob("events.out.tfevents*"))
    loaded = stable_diffusion()
    convfusion.load(loaded, tmp_path / "run")
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in block_weights(loaded).items()
    )


def test_resuming_with_another_config_is_refused(pipe, data, tmp_path):
    distill(pipe, data, DistillConfig(steps=1, batch_size=2), tmp_path)
    with pytest.raises(CheckpointError, match="another batch_size, seed"):
        distill(pipe, data, DistillConfig(steps=1, batch_size=3, seed=1), tmp_path, resume=True)


def test_distilling_without_a_teacher_is_refused(data):
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    convfusion.drop_attention(pipe)
    with pytest.raises(ConvFusionError, match="attention of this model was dropped"):
        distill(pipe, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 5, "accumulation": 2}, "multiple of accumulation"),
        ({"autocast": "int8"}, "one of no, bf16, fp16"),
        ({"caption_drop": 2.0}, "between 0 and 1"),
        ({"warmup": -2}, "or -1 for one that fits the run, not -2"),
        ({"steps": 40, "warmup": 100}, "which has 40: lower warmup, or set it to -1.*takes 2"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ConvFusionError, match=message):
        DistillConfig(**options)


def test_rate_rises_holds_and_falls():
    config = DistillConfig(steps=100, warmup=10, decay=0.5)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[49] == 1
    assert rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.01


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (40, 2), (1000, 50), (60_000, 100)])
def test_a_warmup_that_is_not_named_fits_the_run(steps, warmup):
    config, same = DistillConfig(steps=steps), DistillConfig(steps=steps, warmup=warmup)
    first = range(min(steps, 200))
    assert [config.rate(step) for step in first] == [same.rate(step) for step in first]
    assert DistillConfig.from_dict(config.to_dict()) == config


def test_the_recipe_of_the_paper_is_that_of_its_settings_file():
    settings = read_settings(Path(__file__).parent.parent / "configs" / "sd15.toml", {})
    own = {"autocast", "checkpointing", "save_every", "validate_every"}  # to the machine's measure
    changes = {name: getattr(settings.distill, name) for name in own}
    assert DistillConfig.paper(**changes) == settings.distill
    named = {"recipe": "paper", "distill": {"steps": 400, "losses": {"feature": 0.0}}}
    with pytest.raises(ConvFusionError, match="warmup of 500 steps is longer than the run"):
        read_settings(None, named)
    named["distill"]["warmup"] = 5
    losses = LossWeights(noise=1.0, feature=0.0)
    expected = DistillConfig.paper(steps=400, warmup=5, losses=losses)
    assert read_settings(None, named).distill == expected


def test_state_of_a_run_is_plain_data(pipe, data, tmp_path):
    """Nothing in a checkpoint needs unpickling."""
    distill(pipe, data, DistillConfig(steps=1, batch_size=2), tmp_path)
    folder = next((tmp_path / "checkpoints").iterdir())
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "blocks.safetensors",
        "convfusion.json",
        "optimizer.safetensors",
        "trainer.json",
    }
    assert json.loads((folder / "trainer.json").read_text())["step"] == 1


@pytest.mark.parametrize("family", PIPELINES)
def test_every_family_distils_from_captions(family):
    pipe = PIPELINES[family]()
    convfusion.convert(pipe)
    before = block_weights(pipe)
    side = 8 if family == "sd" else 16
    data = LatentDataset(torch.randn(2, 4, side, side), ["red", "green"])
    result = distill(pipe, data, DistillConfig(steps=1, batch_size=2, warmup=1))
    assert all(np.isfinite(value) for value in result.losses.values())
    assert all(not torch.equal(before[name], now) for name, now in block_weights(pipe).items())


def test_half_precision_base_trains_blocks_in_full(data, tmp_path, fresh_accelerate):
    pipe = stable_diffusion().to(torch.bfloat16)
    convfusion.convert(pipe)
    seen = []

    def picture(pipe, step):
        seen.append({p.dtype for m in mixers_of(pipe).values() for p in m.parameters()})
        return generate(pipe, ["red"], steps=1)[0]

    config = DistillConfig(steps=1, batch_size=2, autocast="bf16", validate_every=1)
    distill(pipe, data, config, tmp_path, validate=picture)
    assert seen == [{torch.float32}]
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    with pytest.raises(ConvFusionError, match="holds blocks or the checkpoints"):
        distill(pipe, data, config, tmp_path)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_unfitting_precision_is_refused(data):
    pipe = stable_diffusion_converted()
    with pytest.raises(ConvFusionError, match="on a CPU take autocast bf16"):
        distill(pipe, data, DistillConfig(steps=1, autocast="fp16"))
    pipe.to(torch.bfloat16)
    with pytest.raises(ConvFusionError, match="autocast 'bf16', or load it in float32"):
        distill(pipe, data, DistillConfig(steps=1))


def stable_diffusion_converted() -> StableDiffusionPipeline:
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    return pipe


def test_a_used_folder_is_refused_and_a_run_can_be_extended(pipe, data, tmp_path):
    distill(pipe, data, DistillConfig(steps=1, batch_size=2), tmp_path)
    with pytest.raises(ConvFusionError, match="holds blocks or the checkpoints of a run"):
        distill(pipe, data, DistillConfig(steps=2, batch_size=2), tmp_path)
    longer = DistillConfig(steps=2, batch_size=2, save_every=1)
    assert distill(pipe, data, longer, tmp_path, resume=True).steps == 2


def test_a_copy_of_a_checkpoint_is_no_checkpoint(pipe, data, tmp_path):
    """Nor is it deleted with the old ones."""
    config = DistillConfig(steps=1, batch_size=2, save_every=1)
    distill(pipe, data, config, tmp_path)
    kept = tmp_path / "checkpoints" / "step-9-best"
    shutil.copytree(tmp_path / "checkpoints" / "step-0000001", kept)
    distill(pipe, data, replace(config, steps=4), tmp_path, resume=True)
    names = sorted(path.name for path in kept.parent.iterdir())
    assert names == ["step-0000003", "step-0000004", "step-9-best"]


def test_a_run_that_broke_leaves_no_gradients_to_the_next(data, monkeypatch):
    """It may break between the parts of a batch, as for want of memory."""
    config = DistillConfig(steps=1, batch_size=4, accumulation=4)
    expected, pipe = stable_diffusion_converted(), stable_diffusion_converted()
    pipe.unet.load_state_dict(expected.unet.state_dict())
    distill(expected, data, config)
    forward, calls = DistillTask.forward, []

    def fails_later(task, *part, **options):
        calls.append(part)
        if len(calls) == 3:
            raise MemoryError
        return forward(task, *part, **options)

    with monkeypatch.context() as patched:
        patched.setattr(DistillTask, "forward", fails_later)
        with pytest.raises(MemoryError):
            distill(pipe, data, config)
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    weight = next(iter(mixers_of(pipe).values())).proj_out.weight
    weight.requires_grad_(True).grad = torch.ones_like(weight)  # whoever left it
    distill(pipe, data, config)
    for name, tensor in block_weights(expected).items():
        assert torch.equal(block_weights(pipe)[name], tensor), name


def test_samples_held_out_are_measured_once_at_the_end(pipe, data, monkeypatch):
    calls = []
    measure = trainer_module.held_out_error

    def counted(*args, **options):
        calls.append(args)
        return measure(*args, **options)

    monkeypatch.setattr(trainer_module, "held_out_error", counted)
    result = distill(pipe, data, DistillConfig(steps=2, batch_size=1, held_out=1))
    assert len(calls) == 1 and result.epsilon_error > 0


def test_losses_are_loss_weights():
    with pytest.raises(ConvFusionError, match="losses must be a LossWeights, not"):
        DistillConfig(losses={"noise": 0.0})


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, -1, 0)])
def test_loss_weights_must_leave_something_to_do(weights):
    with pytest.raises(ConvFusionError, match="must not be negative, nor all"):
        LossWeights(*weights)


RUN_DAMAGE = {
    "trainer.json": lambda path: path.write_text("{"),
    "optimizer.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "blocks.safetensors": lambda path: path.write_bytes(b""),
    "no moments": lambda path: save_file({}, path.with_name("optimizer.safetensors")),
}


@pytest.mark.parametrize("name", RUN_DAMAGE)
def test_a_damaged_run_is_named_and_changes_nothing(data, tmp_path, name):
    config = DistillConfig(steps=1, batch_size=2)
    distill(stable_diffusion_converted(), data, config, tmp_path)
    RUN_DAMAGE[name](tmp_path / "checkpoints" / "step-0000001" / name)
    pipe = stable_diffusion_converted()
    before = block_weights(pipe)
    with pytest.raises(CheckpointError):
        distill(pipe, data, config, tmp_path, resume=True)
    assert all(torch.equal(before[key], value) for key, value in block_weights(pipe).items())


def test_latents_that_are_not_finite_are_refused():
    with pytest.raises(ConvFusionError, match="latents are not finite"):
        LatentDataset(torch.full((1, 4, 8, 8), torch.inf), ["red"])


def test_every_switch_is_put_back(pipe, data):
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    state = torch.get_rng_state()
    distill(pipe, data, DistillConfig(steps=1, batch_size=2, checkpointing=True))
    assert pipe.unet.is_gradient_checkpointing
    assert all(module.training for module in pipe.unet.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_nothing_to_train_is_refused(data):
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(convfusion.Removed()))
    with pytest.raises(ConvFusionError, match="nothing to train"):
        distill(pipe, data)
