"""Transformers of videos, in one table: converted on grids of frames, rows and columns."""

import copy

import pytest
import torch
from tiny_models import VIDEOS, randomise, run_video

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, Halo, MeanOnly, Removed, uniform
from convfusion.bench.counts import operation_table
from convfusion.bench.models import BenchModel
from convfusion.bench.speed_plan import plan_speed
from convfusion.errors import UnsupportedModelError
from convfusion.families import example_inputs, family_of, list_sites
from convfusion.mixers import Depthwise, GeneralisedLinear
from convfusion.operations import site_operations
from convfusion.surgery import attention_back, attention_teacher, mixers_of, presets

pytestmark = pytest.mark.libraries

VIDEO = DeltaConv(kernel_size=3, frame_kernel_size=3, first_frame_branch=True)
NEAR = Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(1, 2, 2))
MIXERS = [VIDEO, NEAR, DeltaConv(kernel_size=3), MeanOnly(), Removed(), GeneralisedLinear()]
SIZES = ((3, 8, 12), (4, 12, 6))
each = pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: f"{type(m).__name__}{m == VIDEO}")
table = pytest.mark.parametrize("name", VIDEOS)


def make(name):
    torch.manual_seed(1)
    return VIDEOS[name][0]().eval()


def converted(name, config):
    model = make(name)
    convfusion.convert(model, config)
    randomise(mixers_of(model), std=0.1)
    return model


def first_half(name, mixer):
    """A config for the first half of the sites, in the order of the modules."""
    paths = [site.path for site in list_sites(make(name))]
    return ConvertConfig({path: mixer for path in paths[: (len(paths) + 1) // 2]})


def naive_output(model, frames, height, width):
    """The output when each mixer is told its grid by hand."""
    mixers, patch = mixers_of(model), family_of(model).patch_size(model)
    grid = (frames, height // patch, width // patch)
    stock = copy.deepcopy(model)
    convfusion.revert(stock)
    for path, mixer in mixers.items():

        def forward(tokens, *args, mixer=mixer, **kwargs):
            return mixer(tokens, grid)

        stock.get_submodule(path).forward = forward
    return run_video(stock, frames, height, width)


@table
@each
@torch.no_grad()
def test_two_sizes_in_a_row_save_load_and_revert(name, mixer, tmp_path):
    original = make(name)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    expected = [run_video(original, *size) for size in SIZES]
    model = converted(name, uniform(mixer))
    for size, stock in zip(SIZES, expected, strict=True):
        assert torch.equal(run_video(model, *size), naive_output(model, *size))
        assert not torch.allclose(run_video(model, *size), stock, rtol=0.01)
    convfusion.save(model, tmp_path)
    loaded = make(name)
    convfusion.load(loaded, tmp_path)
    assert torch.equal(run_video(loaded, *SIZES[0]), run_video(model, *SIZES[0]))
    convfusion.revert(loaded)
    for size, stock in zip(SIZES, expected, strict=True):
        assert torch.equal(run_video(loaded, *size), stock)
    after = loaded.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in original.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.modules())


@table
@torch.no_grad()
def test_sites_that_stay_are_not_given_the_grid(name):
    model = converted(name, first_half(name, NEAR))
    for size in SIZES:
        assert torch.equal(run_video(model, *size), naive_output(model, *size))
    expected = run_video(make(name), *SIZES[0])
    with attention_back(model, mixers_of(model)):
        assert torch.equal(run_video(model, *SIZES[0]), expected)
    assert torch.equal(run_video(attention_teacher(model), *SIZES[0]), expected)


@table
@pytest.mark.parametrize("mixer", [VIDEO, NEAR], ids=lambda m: type(m).__name__)
def test_checkpointing_with_two_sizes_in_flight(name, mixer):
    def gradients(checkpointing):
        model = converted(name, first_half(name, mixer))
        if checkpointing:
            model.enable_gradient_checkpointing()
        parameters = [p for each in mixers_of(model).values() for p in each.parameters()]
        outputs = [run_video(model, *size) for size in SIZES]
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.any()
        torch.testing.assert_close(checkpointed, plain)


@table
@torch.no_grad()
def test_it_compiles_without_a_break(name):
    model = converted(name, first_half(name, VIDEO))
    expected = [run_video(model, *size) for size in SIZES]
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager", dynamic=True)
    for size, output in zip(SIZES, expected, strict=True):
        torch.testing.assert_close(run_video(model, *size), output)


@table
@torch.no_grad()
def test_a_copy_stands_alone(name):
    model = converted(name, uniform(VIDEO))
    twin = copy.deepcopy(model)
    convfusion.revert(twin)
    assert torch.equal(run_video(twin, *SIZES[0]), run_video(make(name), *SIZES[0]))
    assert torch.equal(run_video(model, *SIZES[0]), naive_output(model, *SIZES[0]))


@table
@torch.no_grad()
def test_dropping_attention_frees_it_and_draws_the_same(name):
    model = converted(name, uniform(VIDEO))
    expected = run_video(model, *SIZES[0])
    weights = sum(row.attention_parameters for row in convfusion.status(model).sites)
    total = sum(p.numel() for p in model.parameters())
    convfusion.drop_attention(model)
    assert sum(p.numel() for p in model.parameters()) == total - weights
    assert torch.equal(run_video(model, *SIZES[0]), expected)
    with pytest.raises(ConvFusionError, match="were dropped"):
        convfusion.revert(model)


@table
@torch.no_grad()
def test_the_mean_alone_is_uniform_attention(name):
    """Which the projections of the attention, and the scale that it is added with, decide."""
    model, mean = make(name), make(name)
    for site in list_sites(model):
        attention = model.get_submodule(site.path)
        query = attention.to_query if hasattr(attention, "to_query") else attention.to_q
        for parameter in query.parameters():
            parameter.zero_()
    convfusion.convert(mean, uniform(MeanOnly()))
    expected = run_video(model, *SIZES[0])
    torch.testing.assert_close(run_video(mean, *SIZES[0]), expected, rtol=1e-4, atol=1e-5)


@table
def test_its_sites_are_counted_and_planned(name):
    count = VIDEOS[name][1]
    with torch.device("meta"):
        model = VIDEOS[name][0]()
    status = convfusion.convert(model)
    assert len(status.sites) == status.converted == count
    assert family_of(model).name == status.family
    operations = site_operations(model, (2, 16, 16))
    tokens, channels = 2 * 8 * 8, status.sites[0].site.channels
    attention = 4 * 2 * tokens * channels**2 + 2 * 2 * tokens**2 * channels
    assert [own for own, _ in operations.values()] == [attention] * count
    convfusion.revert(model)
    table = operation_table(BenchModel("own", model, 8), [(128, 128)])
    assert sum(row.sites for row in table if row.mixer == "attention") == count
    preset = presets.get_preset(presets.choose_preset(model))
    plan = plan_speed(make(name), preset, (4, 4), batch=1)
    assert sum(len(site.paths) for site in plan.sites) == count


@table
@pytest.mark.parametrize("mixer", [Halo(), Depthwise()], ids=lambda m: type(m).__name__)
def test_a_mixer_for_pictures_is_refused(name, mixer):
    with pytest.raises(ConvFusionError, match=r"grid of \(frames, height, width\)"):
        convfusion.convert(make(name), uniform(mixer))


@table
def test_what_needs_the_rotary_embedding_is_refused(name):
    model = converted(name, uniform(NEAR))
    with pytest.raises(UnsupportedModelError, match="turns its queries and keys"):
        convfusion.start_from_attention(model, [example_inputs(model, SIZES[0])])
