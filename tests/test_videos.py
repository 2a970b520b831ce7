"""Families of videos on grids of three sides, beside what the table of all families tests."""

import copy

import pytest
import torch
from tiny_models import VIDEOS, randomise, run_video

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, Halo, MeanOnly, Removed, uniform
from convfusion.bench.counts import operation_table
from convfusion.bench.models import BenchModel
from convfusion.families import example_inputs, family_of, list_sites
from convfusion.mixers import Depthwise, GeneralisedLinear
from convfusion.operations import site_operations
from convfusion.surgery import attention_back, attention_teacher, mixers_of

VIDEO = DeltaConv(kernel_size=3, frame_kernel_size=3, first_frame_branch=True)
NEAR = Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(1, 2, 2))
MIXERS = [VIDEO, NEAR, DeltaConv(kernel_size=3), MeanOnly(), Removed(), GeneralisedLinear()]
SIZES = ((3, 8, 12), (4, 12, 6))  # of other frames, too
each = pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: f"{type(m).__name__}{m == VIDEO}")
table = pytest.mark.parametrize("case", VIDEOS, ids=lambda case: case.name)


def first_half(case, mixer):
    """A config for the first half of the sites, in the order of the modules."""
    paths = [site.path for site in list_sites(case.model())]
    return ConvertConfig(dict.fromkeys(paths[: (len(paths) + 1) // 2], mixer))


def converted(case, config):
    model = case.model()
    convfusion.convert(model, config)
    randomise(mixers_of(model), std=0.1)
    return model


def naive_output(model, frames, height, width):
    """The output when each mixer is told its grid by hand."""
    mixers, patch = mixers_of(model), family_of(model).patch_size(model)
    grid = (frames, height // patch, width // patch)
    stock = copy.deepcopy(model)
    convfusion.revert(stock)
    for path, mixer in mixers.items():

        def forward(*args, mixer=mixer, **kwargs):
            return mixer(args[0] if args else kwargs["hidden_states"], grid)

        stock.get_submodule(path).forward = forward
    return run_video(stock, frames, height, width)


@table
@each
@torch.no_grad()
def test_every_mixer_is_told_frames_rows_and_columns(case, mixer):
    model, original = converted(case, uniform(mixer)), case.model()
    for size in SIZES:
        output = run_video(model, *size)
        assert torch.equal(output, naive_output(model, *size))
        assert not torch.allclose(output, run_video(original, *size), rtol=0.01)


@table
@torch.no_grad()
def test_attentions_that_stay_compute_what_they_did(case):
    model = converted(case, first_half(case, NEAR))
    for size in SIZES:
        assert torch.equal(run_video(model, *size), naive_output(model, *size))
    expected = run_video(case.model(), *SIZES[0])
    with attention_back(model, mixers_of(model)):
        assert torch.equal(run_video(model, *SIZES[0]), expected)
    assert torch.equal(run_video(attention_teacher(model), *SIZES[0]), expected)
    convfusion.revert(model)
    assert torch.equal(run_video(model, *SIZES[0]), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@table
def test_checkpointing_with_two_sizes_in_flight_beside_attention(case):
    def gradients(checkpointing):
        model = converted(case, first_half(case, VIDEO))
        if checkpointing:
            model.enable_gradient_checkpointing()
        parameters = [p for each in mixers_of(model).values() for p in each.parameters()]
        outputs = [run_video(model, *size) for size in SIZES]
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.any()
        torch.testing.assert_close(checkpointed, plain)


@table
def test_the_operations_of_its_sites_are_those_of_the_formula(case):
    with torch.device("meta"):
        model = case.make()
    status = convfusion.convert(model, uniform(VIDEO))
    patch = family_of(model).patch_size(model)
    tokens, channels = 2 * (16 // patch) ** 2, status.sites[0].site.channels
    attention = 4 * 2 * tokens * channels**2 + 2 * 2 * tokens**2 * channels
    if case.name == "ltx2":  # a gate of each of two heads for every token
        attention += 2 * tokens * channels * 2
    operations = site_operations(model, (2, 16, 16))
    assert [own for own, _ in operations.values()] == [attention] * case.sites
    convfusion.revert(model)
    table = operation_table(BenchModel("own", model, 8), [(128, 128)])
    assert sum(row.sites for row in table if row.mixer == "attention") == case.sites


@table
@pytest.mark.parametrize("mixer", [Halo(), Depthwise()], ids=lambda m: type(m).__name__)
def test_a_mixer_for_pictures_is_refused(case, mixer):
    with pytest.raises(ConvFusionError, match=r"grid of \(frames, height, width\)"):
        convfusion.convert(case.model(), uniform(mixer))


@table
def test_convolutions_start_from_the_mean_of_their_attention(case):
    model = case.model()
    convfusion.convert(model, uniform(VIDEO))
    before = {path: mixer.proj_in.weight.clone() for path, mixer in mixers_of(model).items()}
    errors = convfusion.start_from_attention(model, [example_inputs(model, SIZES[0])])
    assert errors.keys() == before.keys() and all(error < 1 for error in errors.values())
    for path, mixer in mixers_of(model).items():
        assert not torch.equal(mixer.proj_in.weight, before[path])
