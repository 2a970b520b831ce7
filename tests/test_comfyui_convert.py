"""The node for ComfyUI that makes blocks without training."""

import re

import comfyui_models as comfyui
import pytest
import torch
from comfyui_models import call, call_twin, make_inputs, make_model, make_twin

import convfusion
from convfusion import ConvFusionError, DeltaConv, Halo
from convfusion.surgery import mixers_of

comfyui.load_nodes()

from custom_nodes_convfusion import layout, measuring, nodes  # noqa: E402

DRAW = {"pictures": 1, "steps": 3, "cfg": 2.0, "seed": 0}
KIND = {"mixer": "halo (nearer)", "key_share": 0.5, "value_share": 0.75, "budget": ""}


@pytest.fixture(autouse=True)
def nothing_stays_loaded():
    yield
    comfyui.comfy.model_management.unload_all_models()


@pytest.fixture
def model():
    return make_model("sd15")


@pytest.fixture
def folder(tmp_path):
    comfyui.set_folder(tmp_path)
    return tmp_path


def convert(model, **options):
    generator = torch.Generator().manual_seed(3)
    positive, negative = ([[torch.randn(1, 7, 16, generator=generator), {}]] for _ in range(2))
    options = {"name": "mine", **DRAW, **KIND, **options}
    latent = {"samples": torch.zeros(1, 4, 16, 24)}
    with torch.inference_mode():  # as ComfyUI runs nodes
        return nodes.ConvertWithoutTraining().convert(model, positive, negative, latent, **options)


def errors_of(report):
    """The error of the predicted noise, its standard error, and that without self-attention."""
    model = re.search(r"model predicts: (\S+) ± (\S+), ", report).groups()
    without = re.search(r"of the (\S+) without any", report).groups()
    return tuple(float(number) for number in model + without)


def test_blocks_are_made_and_stand_in(model, folder):
    inputs = make_inputs(16, 24)
    stock = call(model, inputs)
    patched, path, report = convert(model)
    assert path == folder / "mine_00001.safetensors" and list(folder.iterdir()) == [path]
    changed = call(patched, inputs)
    assert torch.equal(call(model, inputs), stock)
    twin = make_twin(model, layout.build_skeleton(model, layout.find_places(model)).config)
    status = convfusion.load(twin, path)
    assert status.converted == 7 and str(status.record).endswith("started from the attention")
    assert all(m.config == Halo(key_ratio=0.5, value_ratio=0.75) for m in mixers_of(twin).values())
    torch.testing.assert_close(changed, call_twin(twin, inputs), rtol=1e-5, atol=1e-5)
    error, spread, removed = errors_of(report)
    assert 0 < error < removed / 2 and spread < error
    assert sum(line.startswith("up ") for line in report.splitlines()) == 4


def test_the_blocks_are_as_near_as_the_report_says(model, folder):
    """Against the latents of a picture that was not drawn, whose noise levels are others."""
    patched, _, report = convert(model)
    inputs = make_inputs(16, 24)
    stock, changed = call(model, inputs), call(patched, inputs)
    error = ((changed - stock).square().sum() / stock.square().sum()).item()
    assert error < 10 * errors_of(report)[0]


def test_more_channels_are_nearer(model, folder):
    errors = [
        errors_of(convert(model, key_share=share, value_share=share)[2])[0]
        for share in (0.25, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_delta_conv_can_be_chosen(model, folder):
    patched, path, report = convert(model, mixer="delta_conv (cheaper)")
    twin = make_twin(model, layout.build_skeleton(model, layout.find_places(model)).config)
    convfusion.load(twin, path)
    assert all(mixer.config == DeltaConv() for mixer in mixers_of(twin).values())
    error, _, removed = errors_of(report)
    assert error < removed
    call(patched, make_inputs(16, 24))


def test_a_budget_chooses_site_by_site(model, folder, monkeypatch):
    monkeypatch.setattr("convfusion.budget.measure.RATIOS", (0.25, 1.0))
    monkeypatch.setattr("convfusion.budget.measure.WINDOWS", ((4, 8),))
    patched, _, report = convert(model, budget="2x")
    saved = float(report.split("all sites together take ")[1].split("×")[0])
    assert 2 <= saved < 4
    error, _, removed = errors_of(report)
    assert error < removed
    call(patched, make_inputs(16, 24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "fast"}, "a budget looks like 4x"),
        ({"name": "../mine"}, "is no name for a file"),
        ({"name": " "}, "is no name for a file"),
    ],
)
def test_bad_input_is_refused_before_any_picture(model, folder, monkeypatch, options, message):
    monkeypatch.setattr(measuring._Measured, "draw", None)
    with pytest.raises(ConvFusionError, match=message):
        convert(model, **options)
    assert list(folder.iterdir()) == []


def test_a_file_is_never_written_over(model, folder):
    first = convert(model)[1]
    content = first.read_bytes()
    assert convert(model)[1] == folder / "mine_00002.safetensors"
    assert first.read_bytes() == content


def test_it_can_be_stopped_and_leaves_nothing(model, folder, monkeypatch):
    inputs = make_inputs(16, 24)
    stock = call(model, inputs)
    bars = []

    class Bar(comfyui.comfy.utils.ProgressBar):
        def update_absolute(self, value, total=None, preview=None):
            bars.append((value, total))
            if value == stop:
                comfyui.comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfyui.comfy.utils, "ProgressBar", Bar)
    stop: int | None = None
    convert(model, name="whole")
    assert [done for done, _ in bars] == list(range(1, 3 + 7 + 1))
    assert {total for _, total in bars} == {3 + 7}
    for number in (2, 6):
        stop = number
        with pytest.raises(comfyui.comfy.model_management.InterruptProcessingException):
            convert(model)
        forwards = [block.attn1.forward for block in blocks_of(model)]
        assert not any(isinstance(each, measuring.WatchedSite) for each in forwards)
        assert torch.equal(call(model, inputs), stock)
    assert [path.name for path in folder.iterdir()] == ["whole_00001.safetensors"]


def blocks_of(model):
    return [m for m in model.model.modules() if hasattr(m, "attn1")]


def test_the_wrapper_of_another_node_is_called(model, folder):
    seen = []

    def wrapper(apply_model, arguments):
        seen.append(arguments["timestep"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(wrapper)
    convert(wrapped)
    calls = 3
    assert len(seen) == calls * 3  # drawn, and compared with blocks, and without attention


def test_weights_are_read_as_they_are_computed_with():
    """Of a layer that folds a LoRA in when it is called, or has weights that only it can read."""

    class Folding(torch.nn.Linear):
        weight_function = ("a LoRA",)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight * 2, self.bias)

    layer = Folding(6, 4)
    weight, bias = measuring.read_layer(layer, torch.device("cpu"))
    torch.testing.assert_close(weight, layer.weight * 2)
    torch.testing.assert_close(bias, layer.bias)
    plain = torch.nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
    weight, bias = measuring.read_layer(plain, torch.device("cpu"))
    assert bias is None and torch.equal(weight, plain.weight.float())
