"""Weights that are cast, offloaded, quantised, wrapped or shared, where blocks meet them."""

import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

import convfusion
from convfusion import ConvFusionError, UnsupportedModelError, mini, uniform
from convfusion.mixers import GeneralisedLinear
from convfusion.surgery import attention_teacher, mixers_of

FLOAT8, CPU = torch.float8_e4m3fn, torch.device("cpu")


def unet():
    return mini.load_teacher().unet


def run(model):
    g = torch.Generator().manual_seed(0)
    text = torch.randn(1, 7, model.config.cross_attention_dim, generator=g)
    with torch.no_grad():
        return model(torch.randn(1, 4, 16, 16, generator=g), 500, text).sample


def cast(model):
    model.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)


def offload(model):
    cpu_offload(model, execution_device=CPU)


def offload_in_groups(model):
    apply_group_offloading(model, onload_device=CPU, offload_type="leaf_level")


def quantise(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)


def lora(*targets):
    return lambda model: model.add_adapter(LoraConfig(r=2, target_modules=list(targets)))


def tie(model):
    blocks = list(mixers_of(model).values())
    blocks[2].proj_in = blocks[3].proj_in


def put_blocks(model):
    return convfusion.load(model, mini.STUDENTS / "delta_conv")


@pytest.mark.parametrize("put", [convfusion.convert, put_blocks])
def test_blocks_compute_in_the_dtype_that_their_attention_computes_in(put):
    model = unet()
    cast(model)
    put(model)
    weights = [p for mixer in mixers_of(model).values() for p in mixer.parameters()]
    assert {p.dtype for p in weights} == {torch.float32}
    assert run(model).isfinite().all()
    with pytest.raises(ConvFusionError, match="layerwise casting"):
        attention_teacher(model)


@pytest.mark.parametrize("put", [convfusion.convert, put_blocks])
@pytest.mark.parametrize("away", [offload, offload_in_groups])
def test_a_model_that_is_offloaded_part_by_part_is_converted_before(put, away):
    model = unet()
    away(model)
    with pytest.raises(ConvFusionError, match="first, and offload then"):
        put(model)
    assert not mixers_of(model)
    model = unet()
    put(model)
    expected = run(model)
    away(model)
    torch.testing.assert_close(run(model), expected)
    convfusion.revert(model)
    torch.testing.assert_close(run(model), run(unet()))


def test_weights_that_nothing_computes_with_are_refused():
    with pytest.raises(ConvFusionError, match="float8_e4m3fn, which no layer computes in"):
        convfusion.convert(unet().to(FLOAT8))


class Int8(torch.Tensor):
    """A weight as torchao's: a tensor of another kind in a plain layer."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "detach" in str(function):
            return cls(args[0])
        raise NotImplementedError(str(function))


def test_weights_that_are_quantised_one_by_one_are_refused_by_name():
    model = unet()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(Int8(layer.weight.data), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="of the kind Int8: convert before quantising"):
        convfusion.convert(model)


def test_quantised_layers_are_refused_by_the_whole_of_their_name():
    model = unet()
    quantise(model)
    with pytest.raises(UnsupportedModelError, match=r"of the kind torch\.ao\.nn\.\S+\.Linear:"):
        convfusion.convert(model)


CHANGES = {
    "LoRA": (None, lora("to_q", "to_out.0", "proj_in", "proj_out"), "a LoRA or another adapter"),
    "LoRA, linfusion": (uniform(GeneralisedLinear()), lora("to_k", "to_q"), "a LoRA or another"),
    "float8": (None, cast, "is stored as float8_e4m3fn: save blocks before"),
    "quantised": (None, quantise, "is quantised: save and load blocks before"),
    "offloaded": (None, offload, "are offloaded"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_load_would_refuse_is_not_saved(change, tmp_path):
    config, apply, message = CHANGES[change]
    model = unet()
    convfusion.convert(model, config)
    convfusion.save(model, tmp_path / "good")
    apply(model)
    with pytest.raises(ConvFusionError, match=message):
        convfusion.save(model, tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()
    if change != "float8":  # whose blocks may take new values, in the dtype that they have
        with pytest.raises(ConvFusionError, match=message):
            convfusion.load(model, tmp_path / "good")


def test_blocks_that_share_a_layer_are_saved_apart_and_not_filled(tmp_path):
    model = unet()
    put_blocks(model)
    tie(model)
    expected = run(model)
    convfusion.save(model, tmp_path)
    loaded = unet()
    convfusion.load(loaded, tmp_path)
    assert torch.equal(run(loaded), expected)
    with pytest.raises(ConvFusionError, match="is shared with"):
        convfusion.load(model, tmp_path)


def test_blocks_made_under_inference_mode_are_as_any_others():
    model = unet()
    with torch.inference_mode():
        put_blocks(model)
    put_blocks(model)
    assert not any(p.is_inference() for m in mixers_of(model).values() for p in m.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_loaded_blocks_are_as_frozen_as_their_base(frozen):
    model = unet().requires_grad_(not frozen)
    put_blocks(model)
    assert {p.requires_grad for p in model.parameters()} == {not frozen}


def tensors_of(*targets):
    from diffusers.utils import convert_state_dict_to_diffusers

    model = unet()
    lora(*targets)(model)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    return {f"unet.{name}": tensor.detach() for name, tensor in state.items()}


def tellings(pipe):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(pipe.unet)
    return sum("no effect" in str(each.message) for each in said)


def test_every_lora_for_self_attention_is_told_once_and_one_that_is_off_is_not():
    own, pipe = tensors_of("attn1.to_q"), mini.load_student()
    for _ in range(2):  # a server that takes one after another, under the same name
        pipe.load_lora_weights(own)
        assert (tellings(pipe), tellings(pipe)) == (1, 0)
        pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors_of("attn2.to_q"))
    assert tellings(pipe) == 0
    pipe.unload_lora_weights()
    pipe.load_lora_weights(own, adapter_name="style")
    pipe.disable_lora()
    assert tellings(pipe) == 0
    pipe.enable_lora()
    assert tellings(pipe) == 1


def test_a_lora_that_replaces_forwards_is_told():
    model = unet()
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.forward = (lambda own: lambda tokens: 1.1 * own(tokens))(layer.forward)
    put_blocks(model)
    with pytest.warns(UserWarning, match="no effect on 1 converted self-attentions, mid_block"):
        run(model)
