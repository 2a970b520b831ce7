"""Z-Image, Qwen-Image and Lumina 2: captions of several lengths, padding, pictures to go by."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from tiny_joint import lumina2, qwenimage, zimage
from tiny_models import first_output, randomise
from torch import Tensor, nn

import convfusion
from convfusion import ConvertConfig, ConvFusionError, Removed, uniform
from convfusion.families import arrange_call, call_denoiser, family_of, list_sites
from convfusion.highres.savings import run_one_at_a_time
from convfusion.mixers import Depthwise, Halo
from convfusion.surgery import mixers_of

pytestmark = pytest.mark.libraries

MAKE = {
    "zimage": zimage,
    "qwenimage": qwenimage,
    "qwen-edit": partial(qwenimage, zero_cond_t=True),
    "lumina2": lumina2,
}
SIZES = ((12, 20), (20, 14))  # of latents; neither has a multiple of 32 tokens
WHOLE = Halo(block=4, window=10, cells=2, key_ratio=1.0, value_ratio=1.0)
NEAR = Halo(block=2, window=4, cells=2, key_ratio=1.0, value_ratio=1.0)
table = pytest.mark.parametrize("name", MAKE)


def make(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MAKE[name]().eval()


def make_inputs(name: str, height: int, width: int) -> dict[str, Any]:
    """Of two samples, the second of which has a shorter caption."""
    generator = torch.Generator().manual_seed(height)
    places, told = height * width // 4, {"return_dict": False}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "zimage":  # 64 tokens of one caption, and 32 of the other
        pictures = list(draw(2, 4, 1, height, width))
        return {"x": pictures, "t": torch.tensor([0.3, 0.7]), **told,
                "cap_feats": [draw(40, 12), draw(9, 12)]}  # fmt: skip
    told |= {"timestep": torch.tensor([0.3, 0.7]), "encoder_hidden_states": draw(2, 7, 12)}
    seen = torch.arange(7)[None] < torch.tensor([[7], [3]])
    if name == "lumina2":
        return {"hidden_states": draw(2, 4, height, width), "encoder_attention_mask": seen, **told}
    further = [(1, 3, 4)] if name == "qwen-edit" else []
    tokens = places + sum(map(math.prod, further))
    shapes = [[(1, height // 2, width // 2), *further]] * 2
    seen[1, 1] = False  # this one's masks may have gaps
    return {"hidden_states": draw(2, tokens, 16), "img_shapes": shapes, **told,
            "encoder_hidden_states_mask": seen}  # fmt: skip


def run(model: nn.Module, name: str, size: tuple[int, int]) -> Tensor:
    return first_output(model(**make_inputs(name, *size)))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@table
@torch.no_grad()
def test_with_a_window_over_the_grid_it_is_the_stock_model_and_comes_back(name):
    for size in SIZES:
        model = make(name)
        expected = run(model, name, size)
        convfusion.convert(model, uniform(WHOLE))
        assert relative(run(model, name, size), expected) < 1e-5
        convfusion.revert(model)
        assert torch.equal(run(model, name, size), expected)


@table
@torch.no_grad()
def test_all_but_the_rows_of_the_image_are_exact(name):
    """Of the captions, their padding and pictures to go by, in the first block that has them."""
    stock = make(name)
    path = next(site.path for site in list_sites(stock) if "refiner" not in site.path)
    for height, width in SIZES:
        rows = []
        for settings in (None, Removed()):
            model, kept = copy.deepcopy(stock), {}
            if settings is not None:
                convfusion.convert(model, ConvertConfig({path: settings}))
            model.get_submodule(path).register_forward_hook(
                lambda module, args, output, kept=kept: kept.update(given=output)
            )
            run(model, name, (height, width))
            rows.append(take_apart(name, kept["given"], height * width // 4))
        (image, text), (changed, same) = rows
        assert relative(changed, image) > 1e-2
        assert relative(same, text) < 1e-6


def take_apart(name: str, given: Any, places: int) -> tuple[Tensor, Tensor]:
    """Rows of the image, and all others, of what an attention gives."""
    if isinstance(given, tuple):
        return given[0][:, :places], torch.cat([given[0][:, places:], given[1]], dim=1)
    words = (7, 3) if name == "lumina2" else (0, 0)
    image = torch.zeros(given.shape[:2], dtype=torch.bool)
    for sample, start in enumerate(words):
        image[sample, start : start + places] = True
    return given[image], given[~image]


@table
@torch.no_grad()
def test_some_of_the_sites_may_stay(name):
    model = make(name)
    expected = run(model, name, SIZES[0])
    for site in list_sites(model):
        twin = make(name)
        convfusion.convert(twin, ConvertConfig({site.path: WHOLE}))
        assert relative(run(twin, name, SIZES[0]), expected) < 1e-5


@table
@torch.no_grad()
def test_samples_are_worked_on_one_by_one(name):
    model = make(name)
    expected = run(model, name, SIZES[0])
    with run_one_at_a_time(model):
        torch.testing.assert_close(run(model, name, SIZES[0]), expected)


@table
def test_checkpointing_computes_each_size_with_its_own_grid(name):
    """Both sizes go forward, then one backward goes through both."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = make(name)
        convfusion.convert(model, uniform(NEAR))
        randomise(mixers_of(model))
        if checkpointing:
            model.enable_gradient_checkpointing()
        outputs = [run(model, name, size) for size in SIZES]
        loss = sum(output.square().sum() for output in outputs)
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("name", ["zimage", "qwen-edit", "lumina2"])
@torch.no_grad()
def test_blocks_compile_one_by_one(name):
    """What a halo block computes is compiled in `test_joint.py`: here the grid must arrive."""
    model = make(name)
    convfusion.convert(model, uniform(Depthwise(kernel_size=3)))
    randomise(mixers_of(model))
    expected = [run(model, name, size) for size in SIZES]
    torch._dynamo.reset()
    blocks = model.transformer_blocks if name == "qwen-edit" else model.layers
    for block in blocks[:1]:
        block.compile(fullgraph=True, backend="eager", dynamic=True)
    for size, output in zip(SIZES, expected, strict=True):
        torch.testing.assert_close(run(model, name, size), output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_padding_of_cached_captions_is_taken_off():
    latents, times = torch.randn(2, 4, 12, 20), torch.tensor([300.0, 700.0])
    for name, states, mask in (
        ("zimage", "cap_feats", "cap_mask"),
        ("qwenimage", "encoder_hidden_states", "encoder_hidden_states_mask"),
    ):
        model = make(name)
        seen = torch.arange(50)[None] < torch.tensor([[40], [9]])
        captions = torch.randn(2, 50, 12)
        told = {states: captions, mask: seen}
        called = arrange_call(model, latents, times, told)
        assert max(len(each) for each in called[states]) == 40
        noise = captions.masked_fill(~seen[..., None], 9.0)
        again = call_denoiser(model, latents, times, {states: noise, mask: seen})
        torch.testing.assert_close(again, call_denoiser(model, latents, times, told))


@pytest.mark.parametrize("name", ["zimage", "lumina2"])
@torch.no_grad()
def test_the_velocity_is_the_opposite_of_what_the_model_gives(name):
    """And the model is told how much of the picture there is, not how much noise."""
    model, inputs = make(name), make_inputs(name, 12, 20)
    family = family_of(model)
    latents = family.unpack_latents(model, inputs[family.latents], (12, 20))
    told = {key: inputs[key] for key in inputs if "cap" in key or "encoder" in key}
    found = call_denoiser(model, latents, torch.tensor([700.0, 300.0]), told)
    output = family.unpack_latents(model, model(**inputs)[0], (12, 20))
    torch.testing.assert_close(found, -output)


def test_several_pictures_are_refused_by_name():
    model = make("zimage")
    convfusion.convert(model)
    inputs = make_inputs("zimage", 12, 20)
    for pictures in ([inputs["x"][0], torch.zeros(4, 1, 8, 8)], [[each] for each in inputs["x"]],
                     [each.expand(4, 2, 12, 20) for each in inputs["x"]]):  # fmt: skip
        with pytest.raises(ConvFusionError, match="takes one picture for each sample"):
            model(**{**inputs, "x": pictures})
    model = make("qwenimage")
    convfusion.convert(model)
    inputs = make_inputs("qwenimage", 12, 20)
    for shapes, message in (
        ([[(1, 6, 10)], [(1, 10, 6)]], "pictures of one size in a batch"),
        ([[(2, 3, 10)]] * 2, "no layers or frames"),
    ):
        with pytest.raises(ConvFusionError, match=message):
            model(**{**inputs, "img_shapes": shapes})
    layered = qwenimage(use_layer3d_rope=True)
    with pytest.raises(convfusion.UnsupportedModelError, match="in layers"):
        convfusion.convert(layered)
