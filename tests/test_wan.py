"""Wan's transformers: converted on grids of three sides, with the grid behind the rotary one."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_models import randomise

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, Halo, MeanOnly, Removed, uniform
from convfusion.bench.models import denoiser_on_meta, full_size_configs
from convfusion.families import example_inputs, list_sites, site_grid
from convfusion.mixers import Depthwise, GeneralisedLinear, mixer_from_dict, mixer_to_dict
from convfusion.operations import site_operations
from convfusion.surgery import attention_back, attention_teacher, mixers_of

VIDEO = DeltaConv(kernel_size=3, frame_kernel_size=3, first_frame_branch=True)
NEAR = Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(1, 2, 2))
MIXERS = [VIDEO, NEAR, DeltaConv(kernel_size=3), MeanOnly(), Removed(), GeneralisedLinear()]
SIZES = ((3, 8, 12), (4, 12, 6))
each = pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: f"{type(m).__name__}{m == VIDEO}")


def make() -> WanTransformer3DModel:
    torch.manual_seed(1)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ).eval()


def run(model, frames, height, width):
    inputs = example_inputs(model, (frames, height, width), batch=2, words=5)
    return model(**inputs)[0]


def converted(config):
    model = make()
    convfusion.convert(model, config)
    randomise(mixers_of(model), std=0.1)
    return model


def naive_output(model, frames, height, width):
    """The output when each mixer is told its grid by hand."""
    mixers, grid = mixers_of(model), (frames, height // 2, width // 2)
    stock = copy.deepcopy(model)
    convfusion.revert(stock)
    for path, mixer in mixers.items():

        def forward(tokens, *args, mixer=mixer, **kwargs):
            return mixer(tokens, grid)

        stock.get_submodule(path).forward = forward
    return run(stock, frames, height, width)


@each
@torch.no_grad()
def test_two_sizes_in_a_row_save_load_and_revert(mixer, tmp_path):
    original = make()
    expected = [run(original, *size) for size in SIZES]
    model = converted(uniform(mixer))
    for size, stock in zip(SIZES, expected, strict=True):
        assert torch.equal(run(model, *size), naive_output(model, *size))
        assert not torch.allclose(run(model, *size), stock, rtol=0.01)
    convfusion.save(model, tmp_path)
    loaded = make()
    convfusion.load(loaded, tmp_path)
    assert torch.equal(run(loaded, *SIZES[0]), run(model, *SIZES[0]))
    convfusion.revert(loaded)
    for size, stock in zip(SIZES, expected, strict=True):
        assert torch.equal(run(loaded, *size), stock)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.modules())


@torch.no_grad()
def test_sites_that_stay_are_not_given_the_grid():
    part = ConvertConfig({"blocks.1.*": NEAR})
    model = converted(part)
    for size in SIZES:
        assert torch.equal(run(model, *size), naive_output(model, *size))
    expected = run(make(), *SIZES[0])
    with attention_back(model, ["blocks.1.attn1"]):
        assert torch.equal(run(model, *SIZES[0]), expected)
    assert torch.equal(run(attention_teacher(model), *SIZES[0]), expected)


@pytest.mark.parametrize("mixer", [VIDEO, NEAR], ids=lambda m: type(m).__name__)
def test_checkpointing_with_two_sizes_in_flight(mixer):
    def gradients(checkpointing):
        model = converted(ConvertConfig({"blocks.[01].*": mixer}))
        if checkpointing:
            model.enable_gradient_checkpointing()
        parameters = [p for each in mixers_of(model).values() for p in each.parameters()]
        outputs = [run(model, *size) for size in SIZES]
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


@torch.no_grad()
def test_it_compiles_without_a_break():
    model = converted(ConvertConfig({"blocks.0.*": VIDEO, "blocks.1.*": NEAR}))
    expected = [run(model, *size) for size in SIZES]
    model.compile(fullgraph=True, backend="eager")
    for size, output in zip(SIZES, expected, strict=True):
        torch.testing.assert_close(run(model, *size), output)


@torch.no_grad()
def test_a_copy_stands_alone():
    model = converted(uniform(VIDEO))
    twin = copy.deepcopy(model)
    convfusion.revert(twin)
    assert torch.equal(run(twin, *SIZES[0]), run(make(), *SIZES[0]))
    assert torch.equal(run(model, *SIZES[0]), naive_output(model, *SIZES[0]))


@pytest.mark.parametrize("mixer", [Halo(), Depthwise()], ids=lambda m: type(m).__name__)
def test_a_mixer_for_pictures_is_refused(mixer):
    with pytest.raises(ConvFusionError, match=r"grid of \(frames, height, width\)"):
        convfusion.convert(make(), uniform(mixer))


@pytest.mark.parametrize(
    ("name", "sites", "billions"), [("wan-1.3b", 30, 1.42), ("wan-14b", 40, 14.29)]
)
def test_full_size_models_convert_on_the_meta_device(name, sites, billions):
    model = denoiser_on_meta(*full_size_configs()[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert site_grid(model, list_sites(model)[0], (60, 104)) == (21, 30, 52)
    status = convfusion.convert(model, uniform(VIDEO))
    assert status.converted == sites
    attention, block = site_operations(model, (21, 60, 104))["blocks.0.attn1"]
    assert attention / block > 10


def test_a_video_block_is_pictures_and_kernels_along_frames():
    """Against the definition: a convolution in a frame, one across frames, the gate, the means."""
    torch.manual_seed(0)
    block = VIDEO.build(8)
    randomise({"block": block})
    frames, height, width = 3, 5, 4
    tokens = torch.randn(2, frames * height * width, 8)
    video = tokens.unflatten(1, (frames, height, width))
    inner = block.proj_in(video).permute(0, 4, 1, 2, 3)  # [B, C', T, H, W]
    stages = []
    for number, within in enumerate(block.convs):
        maps = inner if number == 0 else halve_frames(inner)
        weight = within.weight[:, :, None]
        maps = torch.nn.functional.conv3d(maps, weight, padding=(0, 1, 1), groups=4)
        weight = block.frame_conv.weight[..., None]
        maps = torch.nn.functional.conv3d(maps, weight, padding=(1, 0, 0), groups=4)
        first, second = maps.chunk(2, dim=1)
        gated = first * second / 4**0.5
        stages.append(
            torch.stack(
                [
                    torch.nn.functional.interpolate(each, size=(height, width), mode="bilinear")
                    for each in gated.unbind(2)
                ],
                dim=2,
            )
        )
    mixed = block.proj_out(torch.cat(stages, dim=1).permute(0, 2, 3, 4, 1).flatten(1, 3))
    mixed = mixed + block.mean_proj(tokens.mean(1, keepdim=True))
    mixed = mixed + block.first_frame_proj(video[:, 0].flatten(1, 2).mean(1, keepdim=True))
    torch.testing.assert_close(block(tokens, (frames, height, width)), mixed)
    assert mixer_from_dict(mixer_to_dict(VIDEO)) == VIDEO


def halve_frames(video):
    halved = [
        torch.nn.functional.avg_pool2d(each, 2, ceil_mode=True, count_include_pad=False)
        for each in video.unbind(2)
    ]
    return torch.stack(halved, dim=2)


def test_kernels_along_frames_start_as_nothing():
    """A converted block mixes each frame as one without such kernels would."""
    model = make()
    convfusion.convert(model, uniform(VIDEO))
    block = mixers_of(model)["blocks.0.attn1"]
    assert block.ranks == (3,)
    plain = DeltaConv(kernel_size=3).build(24)
    state = block.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    tokens = torch.randn(2, 3 * 6 * 4, 24)
    torch.testing.assert_close(block(tokens, (3, 6, 4)), plain(tokens, (3, 6, 4)))


def test_an_even_kernel_along_frames_is_refused():
    with pytest.raises(ConvFusionError, match="frame_kernel_size must be odd"):
        DeltaConv(frame_kernel_size=2)
