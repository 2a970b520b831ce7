"""The estimate of memory looks at a model's shapes and leaves the model itself alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.generate import generate
from convfusion.highres import Ladder
from convfusion.highres.ladder import plan_ladder
from convfusion.highres.peaks import estimate_decoder_peak, estimate_denoiser_peak

CPU = torch.device("cpu")


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    from accelerate import cpu_offload  # what diffusers' method calls for each part, on a GPU

    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, CPU)


def group_offload(pipe: Any) -> None:
    for part in (pipe.unet, pipe.vae):
        part.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def compiled(pipe: Any) -> None:
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="eager")


def wrapped(pipe: Any) -> None:  # DeepCache, prompt-to-prompt
    for module in pipe.unet.modules():
        module.forward = (lambda own: lambda *args, **kwargs: own(*args, **kwargs))(module.forward)


@pytest.mark.parametrize(
    "use", [model_offload, sequential_offload, group_offload, casting, compiled, wrapped]
)
def test_a_bound_on_memory_goes_with_what_saves_memory(use):
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(DeltaConv(kernel_size=3)))
    expected = estimate_denoiser_peak(pipe, (16, 16)), estimate_decoder_peak(pipe.vae, (16, 16))
    use(pipe)
    hook = vars(pipe.unet).get("_hf_hook")
    devices = [p.device for p in pipe.unet.parameters()]
    called: list[Any] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: called.append(module))
    assert (
        estimate_denoiser_peak(pipe, (16, 16)),
        estimate_decoder_peak(pipe.vae, (16, 16)),
    ) == expected
    assert pipe.unet.conv_in not in called, "the model itself was called"
    plan_ladder(pipe, (64, 64), Ladder(memory=4.0))
    assert vars(pipe.unet).get("_hf_hook") is hook
    assert [p.device for p in pipe.unet.parameters()] == devices
    if use in (model_offload, sequential_offload):
        assert np.array(generate(pipe, ["red"], steps=1)[0]).std() > 0


def test_what_cannot_be_estimated_is_refused():
    pipe = stable_diffusion()
    pipe.unet.is_quantized = True
    with pytest.raises(ConvFusionError, match="quantised"):
        plan_ladder(pipe, (64, 64), Ladder(memory=4.0))
    pipe.vae.decoder = None  # as that of a consistency decoder, which is a UNet
    with pytest.raises(ConvFusionError, match="AutoencoderKL"):
        estimate_decoder_peak(pipe.vae, (8, 8))
