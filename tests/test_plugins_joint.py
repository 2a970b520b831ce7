"""What people plug into joint models, converted: a test for every row of their table.

The page is docs/plugins.md. As in `test_plugins`, two conversions are used. With a window over the
whole grid a converted pipeline computes what the stock one does, so a plug-in must do the same to
both. With smaller windows it must not matter which came first, the plug-in or the conversion.
"""

import copy
import functools
import warnings

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import randomise
from tiny_pipelines import flux_dev, stable_diffusion_3

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, uniform
from convfusion.mixers import Halo, Shared
from convfusion.surgery import attention_teacher, mixers_of

pytestmark = pytest.mark.libraries

EXACT = ConvertConfig({"*.attn": Halo(8, 16, 8, 1.0, 1.0)})
BLOCKS = ConvertConfig({"*.attn": Halo(2, 2, 2, 1.0, 1.0)})

PICTURE = Image.fromarray((np.indices((32, 32)).sum(0) * 4).astype(np.uint8)).convert("RGB")
MASK = Image.fromarray(np.repeat(np.arange(32) < 16, 32).reshape(32, 32).astype(np.uint8) * 255)

original = {"flux": functools.cache(flux_dev), "sd3": functools.cache(stable_diffusion_3)}


def fresh(kind):
    """A pipeline whose transformer and scheduler are its own."""
    pipe = original[kind]()
    own = {name: copy.deepcopy(getattr(pipe, name)) for name in ("transformer", "scheduler")}
    return type(pipe)(**{**pipe.components, **own})


def as_stock(pipe):
    convfusion.convert(pipe, EXACT)
    return pipe


def with_blocks(pipe):
    convfusion.convert(pipe, BLOCKS)
    randomise(mixers_of(pipe))
    return pipe


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    settings |= {"max_sequence_length": 32, "height": 32, "width": 16, **options}
    return pipe(prompt="green", generator=generator, **settings).images


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_pair(rows, columns, seed, rank=2):
    """The two matrices of a LoRA, rank first."""
    return 0.5 * noise(rank, columns, seed=seed), 0.5 * noise(rows, rank, seed=seed + 1)


OF_IMAGE, OF_TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
OF_DOUBLE = (*OF_IMAGE, "to_out.0", *OF_TEXT, "to_add_out")


@functools.cache
def lora(name):
    """Tensors as `load_lora_weights` takes them, for what text and image share and what not.

    The names are those that training with peft or diffusers gives, or kohya's.
    """
    kind = "sd3" if name.startswith("SD3") else "flux"
    if "kohya" in name:
        return kohya_lora()
    transformer = original[kind]().transformer
    paths = [f"transformer_blocks.0.attn.{layer}" for layer in OF_DOUBLE]
    paths += ["transformer_blocks.0.ff.net.0.proj"]
    if kind == "flux":
        paths += [f"single_transformer_blocks.0.attn.{layer}" for layer in OF_IMAGE]
        paths += ["single_transformer_blocks.1.proj_out"]
    state = {}
    for number, path in enumerate(paths):
        rows, columns = transformer.get_submodule(path).weight.shape
        down, up = make_pair(rows, columns, 2 * number)
        names = ("lora.down", "lora.up") if "older" in name else ("lora_A", "lora_B")
        for matrix, kept in zip(names, (down, up), strict=True):
            state[f"transformer.{path}.{matrix}.weight"] = kept
    return state


def kohya_lora():
    """Of one matrix for queries, keys and values together, and with an alpha of its own.

    Diffusers splits `linear1` of single blocks by the width of the published model, so there is
    none here.
    """
    width = original["flux"]().transformer.inner_dim
    layers = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "double_blocks_0_img_attn_proj": (width, width),
        "double_blocks_0_txt_attn_qkv": (3 * width, width),
        "double_blocks_0_txt_attn_proj": (width, width),
        "single_blocks_0_linear2": (width, 5 * width),
    }
    state = {}
    for number, (layer, shape) in enumerate(layers.items()):
        down, up = make_pair(*shape, 2 * number)
        state[f"lora_unet_{layer}.lora_down.weight"] = down
        state[f"lora_unet_{layer}.lora_up.weight"] = up
        state[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0)
    return state


def with_lora(name):
    def plug(pipe):
        pipe.load_lora_weights(lora(name), adapter_name="style")
        return pipe

    return plug


def as_pipeline(name):
    return lambda pipe: getattr(diffusers, name)(**pipe.components)


def on_backend(pipe):
    pipe.transformer.set_attention_backend("native")
    return pipe


def offloaded(pipe):
    """From the CPU to the CPU: the hooks are those that a GPU has."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):  # the others' must not have hooks
            setattr(pipe, name, copy.deepcopy(part))
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def controlled(pipe):
    """With what a ControlNet gives, added behind the blocks."""
    blocks = {"controlnet_block_samples": 1, "controlnet_single_block_samples": 2}

    def add(module, args, kwargs):
        shape = (*kwargs["hidden_states"].shape[:2], module.inner_dim)
        added = {
            name: [noise(*shape, seed=seed) for seed in range(count)]
            for name, count in blocks.items()
        }
        return args, {**kwargs, **added}

    pipe.transformer.register_forward_pre_hook(add, with_kwargs=True)
    return pipe


# Of which pipeline, what is plugged in, how it is drawn with, and whether it changes what is drawn.
PLUGINS = {
    "FLUX LoRA": ("flux", with_lora("FLUX"), {}, True),
    "FLUX LoRA, older names": ("flux", with_lora("FLUX older"), {}, True),
    "FLUX LoRA, kohya's names": ("flux", with_lora("FLUX kohya"), {}, True),
    "SD3 LoRA": ("sd3", with_lora("SD3"), {}, True),
    "SD3 LoRA, older names": ("sd3", with_lora("SD3 older"), {}, True),
    "ControlNet": ("flux", controlled, {}, True),
    "img2img": ("flux", as_pipeline("FluxImg2ImgPipeline"), {"image": PICTURE}, True),
    "inpainting": (
        "flux",
        as_pipeline("FluxInpaintPipeline"),
        {"image": PICTURE, "mask_image": MASK, "strength": 1.0},
        True,
    ),
    "reference": (
        "flux",
        as_pipeline("FluxKontextPipeline"),
        {"image": PICTURE, "_auto_resize": False, "max_area": 32 * 16},
        True,
    ),
    "negative prompt": (
        "flux",
        lambda pipe: pipe,
        {"true_cfg_scale": 2.0, "negative_prompt": "red"},
        True,
    ),
    "set_attention_backend": ("flux", on_backend, {}, False),
    "model offload": ("flux", offloaded, {}, False),
}
table = pytest.mark.parametrize("name", PLUGINS)
loras = pytest.mark.parametrize("name", [name for name in PLUGINS if "LoRA" in name])


@functools.cache
def unplugged(kind):
    return draw(fresh(kind))


@table
@torch.no_grad()
def test_it_does_to_a_converted_pipeline_what_it_does_to_a_stock_one(name):
    kind, plug, options, changes = PLUGINS[name]
    expected, stock = draw(plug(fresh(kind)), **options), unplugged(kind)
    same = stock.shape == expected.shape and torch.allclose(stock, expected, atol=1e-2)
    assert same != changes
    close(draw(plug(as_stock(fresh(kind))), **options), expected)
    close(draw(as_stock(plug(fresh(kind))), **options), expected)


@table
@torch.no_grad()
def test_the_order_does_not_matter(name):
    kind, plug, options, _ = PLUGINS[name]
    first = draw(plug(with_blocks(fresh(kind))), **options)
    second = draw(with_blocks(plug(fresh(kind))), **options)
    close(first, second)
    plain = draw(plug(fresh(kind)), **options)
    assert not torch.allclose(first, plain, atol=1e-3)


@loras
@torch.no_grad()
def test_all_of_a_lora_applies_and_nothing_is_said(name):
    kind, plug, options, _ = PLUGINS[name]
    pipe = plug(as_stock(fresh(kind)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no effect")
        draw(pipe, **options)
    taught = fresh(kind)
    taught.transformer = attention_teacher(pipe.transformer)
    expected = draw(plug(fresh(kind)), **options)
    close(draw(taught), expected)
    pipe.fuse_lora()
    close(draw(pipe), expected)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close(draw(pipe), unplugged(kind))


@torch.no_grad()
def test_a_lora_beside_a_convolution_of_the_values():
    """Its share of the text goes by the queries and keys, which have the LoRA too."""
    config = uniform(Shared(DeltaConv(3)))

    def converted(pipe):
        convfusion.convert(pipe, config)
        return pipe

    plain, plug = draw(converted(fresh("flux"))), with_lora("FLUX")
    found = draw(plug(converted(fresh("flux"))))
    assert not torch.allclose(found, plain, atol=1e-2)
    first, second = plug(converted(fresh("flux"))), plug(fresh("flux"))
    second.fuse_lora()
    second.unload_lora_weights()
    close(draw(first), draw(converted(second)))


@torch.no_grad()
def test_a_lora_on_an_attention_of_the_image_alone_is_told_by_name():
    pipe = fresh("sd3")
    convfusion.convert(pipe, ConvertConfig({**EXACT.sites, "*.attn2": DeltaConv(3)}))
    state = lora("SD3")
    own = {key.replace(".attn.to_q", ".attn2.to_q"): state[key] for key in state}
    pipe.load_lora_weights(own, adapter_name="style")
    with pytest.warns(UserWarning, match=r"no effect on 1 converted self-attentions, transformer_"
                                         r"blocks\.0\.attn2; "):  # fmt: skip
        draw(pipe)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@torch.no_grad()
def test_fused_projections_are_refused_by_name(kind):
    pipe = as_stock(fresh(kind))
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ConvFusionError, match=r"are fused: call unfuse_qkv_projections\(\)"):
        draw(pipe)
    pipe.transformer.unfuse_qkv_projections()
    pipe = fresh(kind)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ConvFusionError, match=r"transformer_blocks\.0\.attn are fused"):
        as_stock(pipe)


def test_an_ip_adapter_is_refused_by_name():
    pipe = fresh("flux")
    path = "transformer_blocks.0.attn"
    width = pipe.transformer.inner_dim
    added = diffusers.models.transformers.transformer_flux.FluxIPAdapterAttnProcessor(width, 8)
    as_stock(pipe)
    pipe.transformer.get_submodule(path).set_processor(added)
    with pytest.raises(ConvFusionError, match=f"{path} has the processor FluxIPAdapterAttnProc"):
        draw(pipe)
