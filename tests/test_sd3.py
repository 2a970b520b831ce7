"""A tiny Stable Diffusion 3.5 Medium from end to end: pictures whose latents are a flow's."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import stable_diffusion_3

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv
from convfusion.data import LatentDataset, build_cache, open_cache
from convfusion.distill import DistillConfig, distill
from convfusion.evaluate import epsilon_error
from convfusion.families import encode_conditioning
from convfusion.generate import generate
from convfusion.mixers import Halo
from convfusion.surgery import attention_teacher, mixers_of


@pytest.fixture
def pipe():
    pipe = stable_diffusion_3()
    blocks = {"*.attn": Halo(2, 2, 2, 1.0, 1.0), "*.attn2": DeltaConv(3)}
    convfusion.convert(pipe, ConvertConfig(blocks))
    return pipe


def test_captions_are_read_as_the_pipeline_reads_them(pipe):
    told = encode_conditioning(pipe, ["red apple"], (16, 16))
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    generate(pipe, ["red apple"], steps=1, guidance=1.0, size=(16, 16))
    handle.remove()
    assert set(told) == {"encoder_hidden_states", "pooled_projections"}
    for name, tensor in told.items():
        assert torch.equal(tensor, seen[0][name]), name


def test_pictures_are_cached_and_trained_on(pipe, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(("red", "green apple")[number % 2])
    cache = build_cache(pipe, folder, tmp_path / "cache")
    frozen = {n: p.clone() for n, p in pipe.transformer.named_parameters() if ".mixer." not in n}
    blocks = {n: p.clone() for n, p in pipe.transformer.named_parameters() if ".mixer." in n}
    config = DistillConfig(
        steps=3, imitation_steps=1, batch_size=2, held_out=1, learning_rate=1e-2, warmup=0
    )
    result = distill(pipe, cache, config)
    assert result.epsilon_error > 0
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, (frozen | blocks)[name]) == (name in frozen), name
    assert len(open_cache(stable_diffusion_3(), tmp_path / "cache")) == 4
    pipe.text_encoder_2 = stable_diffusion_3().text_encoder
    with pytest.raises(ConvFusionError, match="another text encoder 2"):
        open_cache(pipe, tmp_path / "cache")


def test_the_error_is_that_of_the_velocity(pipe):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    data = LatentDataset(latents, ["red", ""])
    teacher = attention_teacher(pipe.transformer)
    error = epsilon_error(pipe, teacher, data.latents, data.captions, timesteps=[499])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(123_456))
    told = encode_conditioning(pipe, data.captions, (16, 16))
    times = torch.full((2,), 750.0)  # 1000·3·½/(1 + 2·½)
    with torch.no_grad():
        learned, taught = (
            model(0.25 * latents + 0.75 * noise, timestep=times, return_dict=False, **told)[0]
            for model in (pipe.transformer, teacher)
        )
    by_hand = (learned - taught).square().sum((1, 2, 3)) / taught.square().sum((1, 2, 3))
    assert error == pytest.approx(by_hand.mean().item(), rel=1e-4)
    assert mixers_of(pipe).keys() == {
        *("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn")
    }
