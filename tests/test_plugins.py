"""What people plug into a pipeline, on a converted one: a test for every row of docs/plugins.md.

Two conversions are used. With exact neighbourhood attention over the whole grid, a converted
pipeline computes what the stock one does, so a plug-in must do the same to both. With ΔConvBlocks
it must not matter which came first, the plug-in or the conversion.
"""

import copy
import functools
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny_models import randomise
from tiny_pipelines import pixart_sigma, stable_diffusion

import convfusion
from convfusion import ConvFusionError, uniform
from convfusion.mixers import Neighbourhood
from convfusion.surgery import attention_teacher, mixers_of

pytestmark = pytest.mark.libraries

EXACT = uniform(Neighbourhood(41))  # over a grid that is no larger: the attention itself


original = functools.cache(stable_diffusion)


def fresh():
    """A pipeline of its own; what no plug-in changes is shared."""
    parts = original().components
    own = {name: copy.deepcopy(parts[name]) for name in ("unet", "vae", "scheduler")}
    return diffusers.StableDiffusionPipeline(**{**parts, **own}, requires_safety_checker=False)


def as_stock(pipe):
    convfusion.convert(pipe, EXACT)
    return pipe


def without_attention(pipe):
    as_stock(pipe)
    convfusion.drop_attention(pipe)
    return pipe


def with_blocks(pipe):
    convfusion.convert(pipe)
    randomise(mixers_of(pipe))
    return pipe


def draw(pipe, **options):
    """Latents, or pictures where the VAE is what matters."""
    pipe.set_progress_bar_config(disable=True)
    size = {} if "image" in options else {"height": 32, "width": 32}
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    settings |= {**size, **options}
    found = pipe(prompt="green", generator=generator, **settings).images
    return torch.as_tensor(np.asarray(found))


LINEAR = r"(to_q|to_k|to_v|to_out\.0)"


def loaded_lora(pipe, self_attention=False):
    """With a LoRA on cross-attention and feed-forward, and on self-attention if asked for."""
    state = lora()
    if not self_attention:
        state = {name: tensor for name, tensor in state.items() if ".attn1." not in name}
    pipe.load_lora_weights(state, adapter_name="style")
    return pipe


@functools.cache
def lora():
    """Its tensors, as `load_lora_weights` takes them."""
    unet = fresh().unet
    torch.manual_seed(4)
    targets = rf".*(attn[12]\.{LINEAR}|ff\.net\.0\.proj)"
    unet.add_adapter(LoraConfig(r=2, init_lora_weights="gaussian", target_modules=targets))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    return {f"unet.{name}": tensor.detach() for name, tensor in state.items()}


def noise(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PICTURE = Image.fromarray((np.indices((32, 32)).sum(0) * 4).astype(np.uint8)).convert("RGB")
MASK = Image.fromarray(np.repeat(np.arange(32) < 16, 32).reshape(32, 32).astype(np.uint8) * 255)


def controlled(pipe):
    torch.manual_seed(6)
    net = ControlNetModel.from_unet(
        fresh().unet,
        conditioning_channels=3,
        controlnet_conditioning_channel_order="rgb",
    )
    # Two pixels per latent here, and eight where ControlNet's embedding comes from.
    net.controlnet_cond_embedding = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net.eval(), requires_safety_checker=False
    )


def adapted(pipe):
    torch.manual_seed(6)
    adapter = T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2
    ).eval()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return diffusers.StableDiffusionAdapterPipeline(
        **parts, adapter=adapter, requires_safety_checker=False
    )


def with_ip_adapter(pipe):
    unet = pipe.unet
    image = {"proj.weight": noise(4 * 16, 12), "proj.bias": noise(4 * 16)}
    image |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    state = {"image_proj": image, "ip_adapter": {}}
    for i, name in enumerate(original().unet.attn_processors):
        if "attn2" in name:
            wide = unet.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
            for key in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{i}.{key}.weight"] = noise(wide, 16, seed=i)
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    return pipe


def freed(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return pipe


def rescheduled(name):
    def apply(pipe):
        config = {**pipe.scheduler.config, "skip_prk_steps": True}
        pipe.scheduler = getattr(diffusers, name).from_config(config)
        return pipe

    return apply


def after(name, *arguments, of=lambda pipe: pipe, **options):
    def apply(pipe):
        getattr(of(pipe), name)(*arguments, **options)
        return pipe

    return apply


def unet_of(pipe):
    return pipe.unet


def vae_of(pipe):
    return pipe.vae


def offloaded(pipe):
    """From the CPU to the CPU: the hooks are those that a GPU has."""
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # the others' must not have hooks
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def nudged(pipe, step, timestep, values):
    return {"latents": values["latents"] + 0.5}


def as_pipeline(name):
    return lambda pipe: getattr(diffusers, name)(**pipe.components, requires_safety_checker=False)


# What is plugged in, how it is drawn with, and whether it changes what is drawn.
PLUGINS = {
    "LoRA": (loaded_lora, {}, True),
    "ControlNet": (controlled, {"image": PICTURE}, True),
    "T2I-Adapter": (adapted, {"image": PICTURE}, True),
    "IP-Adapter": (with_ip_adapter, {"ip_adapter_image_embeds": [noise(1, 1, 1, 12)]}, True),
    "img2img": (as_pipeline("StableDiffusionImg2ImgPipeline"), {"image": PICTURE}, True),
    "inpainting": (
        as_pipeline("StableDiffusionInpaintPipeline"),
        {"image": PICTURE, "mask_image": MASK, "strength": 0.8},
        True,
    ),
    "FreeU": (freed, {}, True),
    "callbacks": (lambda pipe: pipe, {"callback_on_step_end": nudged}, True),
    "attention slicing": (after("enable_attention_slicing", "max"), {}, False),
    "VAE slicing": (after("enable_slicing", of=vae_of), {"output_type": "np"}, False),
    "VAE tiling": (after("enable_tiling", of=vae_of), {"output_type": "np"}, True),
    "channels last": (after("to", memory_format=torch.channels_last, of=unet_of), {}, False),
    "model offload": (offloaded, {}, False),
    "set_attn_processor": (after("set_attn_processor", AttnProcessor(), of=unet_of), {}, False),
    "fuse_qkv_projections": (after("fuse_qkv_projections"), {}, False),
}
SCHEDULERS = (
    "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "LCMScheduler",
)  # fmt: skip
table = pytest.mark.parametrize("name", PLUGINS)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@functools.cache
def unplugged(output_type="latent"):
    return draw(fresh(), output_type=output_type)


@table
@torch.no_grad()
def test_it_does_to_a_converted_pipeline_what_it_does_to_a_stock_one(name):
    plug, options, changes = PLUGINS[name]
    expected = draw(plug(fresh()), **options)
    stock = unplugged(options.get("output_type", "latent"))
    same = stock.shape == expected.shape and torch.allclose(stock, expected, atol=1e-3)
    assert same != changes
    close(draw(plug(as_stock(fresh())), **options), expected)
    if name != "fuse_qkv_projections":
        close(draw(plug(without_attention(fresh())), **options), expected)


def test_fusing_projections_says_so_where_they_were_dropped():
    with pytest.raises(AttributeError, match="works on a model converted with keep_attention"):
        without_attention(fresh()).fuse_qkv_projections()


@table
@torch.no_grad()
def test_the_order_does_not_matter(name):
    plug, options, _ = PLUGINS[name]
    first = draw(plug(with_blocks(fresh())), **options)
    second = draw(with_blocks(plug(fresh())), **options)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_schedulers(name):
    plug = rescheduled(name)
    close(draw(plug(as_stock(fresh()))), draw(plug(fresh())))


@torch.no_grad()
def test_a_lora_for_self_attention_is_told_once_and_the_rest_applies():
    pipe = as_stock(fresh())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = draw(loaded_lora(pipe, self_attention=True))
        draw(pipe)
    told = [str(each.message) for each in said if "has no effect" in str(each.message)]
    assert len(told) == 1
    assert "the LoRA style has no effect on 7 converted self-attentions" in told[0]
    assert all(path in told[0] for path in mixers_of(pipe))
    close(found, draw(loaded_lora(fresh())))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no effect")
        draw(loaded_lora(as_stock(fresh())))  # all of that one applies


@torch.no_grad()
def test_a_lora_for_self_attention_applies_elsewhere_where_it_was_dropped():
    found = draw(loaded_lora(without_attention(fresh()), self_attention=True))
    close(found, draw(loaded_lora(fresh())))


@torch.no_grad()
def test_a_lora_is_folded_in_before_converting():
    pipe = loaded_lora(fresh(), self_attention=True)
    expected = draw(pipe)
    assert not torch.allclose(expected, draw(loaded_lora(fresh())), atol=1e-2)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    close(draw(as_stock(pipe)), expected)


@torch.no_grad()
def test_a_lora_stays_through_revert_and_in_the_teacher():
    expected = draw(loaded_lora(fresh(), self_attention=True))
    pipe = with_blocks(loaded_lora(fresh(), self_attention=True))
    taught = fresh()
    taught.unet = attention_teacher(pipe.unet)
    close(draw(taught), expected)
    convfusion.revert(pipe)
    close(draw(pipe), expected)
    pipe.unload_lora_weights()
    close(draw(pipe), unplugged())


def test_a_pipeline_is_not_saved_with_a_lora_around_its_weights(tmp_path):
    pipe = loaded_lora(with_blocks(fresh()))
    with pytest.raises(ConvFusionError, match="a LoRA is loaded"):
        convfusion.save_pipeline(pipe, tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


@torch.no_grad()
def test_a_lora_on_pixart():
    def plugged(pipe, targets):
        torch.manual_seed(4)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), pipe.transformer)
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(noise(*parameter.shape))
        return pipe

    def drawn(pipe):
        return draw(pipe, use_resolution_binning=False)

    cross = rf".*attn2\.{LINEAR}"
    expected = drawn(plugged(pixart_sigma(), cross))
    close(drawn(plugged(as_stock(pixart_sigma()), cross)), expected)
    close(drawn(as_stock(plugged(pixart_sigma(), cross))), expected)
    with pytest.warns(UserWarning, match="no effect on 3 converted self-attentions"):
        drawn(plugged(as_stock(pixart_sigma()), rf".*attn[12]\.{LINEAR}"))


def test_controlnet_from_a_converted_unet_is_refused_and_works_after_revert():
    unet = with_blocks(fresh()).unet
    with pytest.raises((RuntimeError, AttributeError)):
        ControlNetModel.from_unet(unet)
    convfusion.revert(unet)
    ControlNetModel.from_unet(unet)


@torch.no_grad()
def test_processors_by_name():
    pipe = as_stock(fresh())
    stock = dict.fromkeys(original().unet.attn_processors, AttnProcessor())
    assert pipe.unet.attn_processors.keys() == stock.keys()
    pipe.unet.set_attn_processor(stock)
    close(draw(pipe), unplugged())
