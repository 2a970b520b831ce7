"""Converting and reverting, for every family in one table."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    UNet2DConditionModel,
)
from tiny_joint import qwenimage
from tiny_models import (
    APART,
    CASES,
    Case,
    first_output,
    randomise,
    run,
    sd15,
    shapes_of,
    short_controlnet,
    short_ltx2,
    two_levels,
)
from torch import nn

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, MeanOnly, Removed, uniform
from convfusion.bench.models import denoiser_on_meta, full_size_configs
from convfusion.families import family_of, list_sites
from convfusion.mixers import MIXERS
from convfusion.mixers.base import projections
from convfusion.mixers.joint import attend_from_text
from convfusion.surgery import mixers_of

pytestmark = pytest.mark.libraries

EVERY_MIXER = [settings() for settings in MIXERS.values()]
EVERY_MIXER += [DeltaConv(mean_branch=False), DeltaConv(stages=1)]
# Mixers do not ask what family a model is of: these have grids of either rank, and a text.
DOORS = [case for case in CASES if case.name in ("pixart", "wan", "sd35")]
table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
apart = pytest.mark.parametrize("case", APART, ids=lambda case: case.name)


def converted(case: Case, config: ConvertConfig | None = None) -> nn.Module:
    model = case.model()
    convfusion.convert(model, config)
    randomise(mixers_of(model))
    return model


def naive_output(model: nn.Module, case: Case, height: int, width: int) -> torch.Tensor:
    """The output when each mixer is told its grid by hand, from the size of the latents alone."""
    stock = copy.deepcopy(model)
    mixers = mixers_of(stock)
    sites = {site.path: site for site in list_sites(stock)}
    patch = family_of(stock).patch_size(stock)
    convfusion.revert(stock)
    for path, mixer in mixers.items():
        factor = patch * 2 ** sites[path].level
        *frames, _, _ = case.latents(height, width)
        grid = (*frames, -(-height // factor), -(-width // factor))[-sites[path].rank :]

        layout = sites[path].joint
        if layout is not None:
            mix = partial(mix_by_hand, stock.get_submodule(path), layout, mixer, grid)
            stock.get_submodule(path).forward = mix
            continue

        def forward(hidden_states, *args, mixer=mixer, grid=grid, path=path, **kwargs):
            if hidden_states.ndim == 3:
                return mixer(hidden_states, grid)
            maps = stock.get_submodule(path).group_norm(hidden_states.flatten(2))
            mixed = mixer(maps.transpose(1, 2), grid).transpose(1, 2)
            return mixed.unflatten(2, grid) + hidden_states

        stock.get_submodule(path).forward = forward
    return run(stock, case, height, width)


def mix_by_hand(attention, layout, mixer, grid, *args, **kwargs):
    """What an attention returns that text and image share, on a grid that nothing carried."""
    tokens = layout.project(attention, grid, *args, **kwargs)
    return layout.finish(attention, mixer(tokens, grid), attend_from_text(tokens), *args, **kwargs)


@table
@torch.no_grad()
def test_forward_at_two_sizes_in_a_row(case):
    model = converted(case)
    original = case.model()
    for height, width in case.sizes:
        output = run(model, case, height, width)
        assert torch.equal(output, naive_output(model, case, height, width))
        assert not torch.allclose(output, run(original, case, height, width), rtol=0.01)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@torch.no_grad()
def test_odd_latents_of_a_unet(case):
    model = converted(case)
    assert torch.equal(run(model, case, 17, 23), naive_output(model, case, 17, 23))


@table
def test_sites_and_preset(case):
    status = convfusion.convert(case.model())
    assert len(status.sites) == status.converted == case.sites
    preset = convfusion.surgery.presets.get_preset(case.preset)
    assert {s.site.path: s.mixer for s in status.sites} == preset.mixers_for(
        s.site.path for s in status.sites
    )


@table
@torch.no_grad()
def test_save_load_revert(case, tmp_path):
    original = case.model()
    before = {key: value.clone() for key, value in original.state_dict().items()}
    expected = run(original, case, *case.sizes[0])
    model = converted(case)
    convfusion.save(model, tmp_path)
    loaded = case.model()
    convfusion.load(loaded, tmp_path)
    for size in case.sizes:
        assert torch.equal(run(loaded, case, *size), run(model, case, *size))
    convfusion.revert(loaded)
    after = loaded.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(loaded, case, *case.sizes[0]), expected)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in original.modules()]
    assert not any(m._forward_pre_hooks for m in loaded.modules())


@table
def test_checkpointing_with_two_sizes_in_flight(case):
    if not case.model()._supports_gradient_checkpointing:
        pytest.skip("diffusers has no gradient checkpointing for this class")

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = converted(case)
        if checkpointing:
            model.enable_gradient_checkpointing()
        parameters = [p for mixer in mixers_of(model).values() for p in mixer.parameters()]
        outputs = [run(model, case, *size) for size in case.sizes]
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


@table
@torch.no_grad()
def test_deepcopy_stands_alone(case):
    model = converted(case)
    size = case.sizes[0]
    expected = run(model, case, *size)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, case, *size), expected)
    convfusion.revert(twin)
    assert torch.equal(run(twin, case, *size), run(case.model(), case, *size))
    assert torch.equal(run(model, case, *size), expected)


@pytest.mark.parametrize("case", DOORS, ids=lambda case: case.name)
@pytest.mark.parametrize("mixer", EVERY_MIXER, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_every_mixer_goes_through_the_same_door(case, mixer, tmp_path):
    fitting = case.fit(mixer)
    if fitting is None:
        pytest.skip("this mixer is for other grids, or knows nothing of a text")
    model = converted(case, uniform(fitting))
    convfusion.save(model, tmp_path)
    loaded = case.model()
    convfusion.load(loaded, tmp_path)
    size = case.sizes[0]
    assert torch.equal(run(loaded, case, *size), run(model, case, *size))


@apart
@torch.no_grad()
def test_dropping_attention_frees_it_and_draws_the_same(case):
    model = converted(case)
    expected = run(model, case, *case.sizes[0])
    weights = sum(row.attention_parameters for row in convfusion.status(model).sites)
    total = sum(p.numel() for p in model.parameters())
    status = convfusion.drop_attention(model)
    assert weights > 0
    assert sum(p.numel() for p in model.parameters()) == total - weights
    assert "fuse_qkv_projections" in str(status)
    assert torch.equal(run(model, case, *case.sizes[0]), expected)
    with pytest.raises(AttributeError, match="keep_attention=True"):
        _ = projections(model.get_submodule(status.sites[0].site.path))
    with pytest.raises(ConvFusionError, match="were dropped"):
        convfusion.revert(model)
    assert torch.equal(run(model, case, *case.sizes[0]), expected)


@apart
@torch.no_grad()
def test_removed_equals_zeroed_attention(case):
    model = case.model()
    for site in list_sites(model):
        for p in projections(model.get_submodule(site.path))[3].parameters():
            p.zero_()
    expected = run(model, case, *case.sizes[0])
    removed = case.model()
    convfusion.convert(removed, uniform(Removed()))
    torch.testing.assert_close(run(removed, case, *case.sizes[0]), expected)


@apart
@torch.no_grad()
def test_mean_only_equals_uniform_attention(case):
    model = case.model()
    for site in list_sites(model):
        attention = model.get_submodule(site.path)
        for p in projections(attention)[0].parameters():
            p.zero_()
        if getattr(attention, "to_gate_logits", None) is not None:
            attention.to_gate_logits.weight.zero_()  # one gate for all tokens
    expected = run(model, case, *case.sizes[0])
    mean = copy.deepcopy(model)
    convfusion.convert(mean, uniform(MeanOnly()))
    torch.testing.assert_close(run(mean, case, *case.sizes[0]), expected, rtol=1e-4, atol=1e-5)


@table
def test_half_precision_and_meta(case):
    half = case.model().to(torch.bfloat16)
    convfusion.convert(half)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        model = case.make()
    assert convfusion.convert(model).converted == case.sites
    assert all(p.is_meta for mixer in mixers_of(model).values() for p in mixer.parameters())


# Sites and channels by level; parameters of the model; of its self-attention, in millions;
# and its preset, where that has another name.
LAYOUTS: dict[str, tuple] = {
    "sd15": ({0: (5, 320), 1: (5, 640), 2: (5, 1280), 3: (1, 1280)}, 859_520_964, 49.6),
    "sd21": ({0: (5, 320), 1: (5, 640), 2: (5, 1280), 3: (1, 1280)}, 865_910_724, 49.6),
    "sdxl": ({1: (10, 640), 2: (60, 1280)}, 2_567_463_684, 409.7),
    "pixart": ({0: (28, 1152)}, 610_856_096, 148.8),
    "dit": ({0: (28, 1152)}, None, 148.8),
    "wan-1.3b": ({0: (30, 1536)}, 1_418_996_800, 283.4, "wan"),
    "wan-14b": ({0: (40, 5120)}, 14_288_491_584, 4195.5, "wan"),
    "wan-14b-image": ({0: (40, 5120)}, 16_394_878_784, 4195.5, "wan"),
    "wan2.2-5b": ({0: (30, 3072)}, 4_999_787_712, 1133.0, "wan"),
    "skyreels-1.3b": ({0: (30, 1536)}, 1_435_525_696, 283.4, "skyreels"),
    "skyreels-14b": ({0: (40, 5120)}, 14_288_491_584, 4195.5, "skyreels"),
    "wan-vace-1.3b": ({0: (45, 1536)}, 2_153_972_032, 425.1, "wan-vace"),
    "wan-vace-14b": ({0: (48, 5120)}, 17_337_592_896, 5034.6, "wan-vace"),
    "cosmos-7b": ({0: (28, 4096)}, 7_236_192_256, 1879.1, "cosmos"),
    "cosmos-14b": ({0: (36, 5120)}, 14_267_149_312, 3774.9, "cosmos"),
    "cosmos2-2b": ({0: (28, 2048)}, 1_956_413_440, 469.8, "cosmos"),
    "kandinsky5-2b": ({0: (32, 1792)}, 2_007_702_848, 411.3, "kandinsky5"),
    "kandinsky5-19b": ({0: (60, 4096)}, 19_311_325_248, 4027.5, "kandinsky5"),
    "ltx-2b": ({0: (28, 2048)}, 1_923_385_472, 470.1, "ltx"),
    "ltx-13b": ({0: (48, 4096)}, 13_042_569_344, 3222.4, "ltx"),
    "ltx-2": ({0: (48, 4096)}, 18_876_174_592, 3222.4, "ltx2"),
    "latte": ({0: (28, 1152)}, 1_057_246_880, 148.8),
    "svd": ({0: (5, 320), 1: (5, 640), 2: (5, 1280), 3: (1, 1280)}, 1_524_623_082, 49.6),
    "animatediff": (
        {0: (5, 320), 1: (5, 640), 2: (5, 1280), 3: (1, 1280)}, 1_312_730_244, 49.6
    ),
    "modelscope": (
        {0: (5, 320), 1: (5, 640), 2: (5, 1280), 3: (1, 1280)}, 1_411_233_860, 49.6
    ),
    "hunyuandit": ({0: (40, 1408)}, 1_499_952_032, 317.4),
    "sd35-medium": ({0: (37, 1536)}, 2_243_171_520, 122.8),  # of `attn2` alone
    "sd3-medium": ({0: (24, 1536)}, 2_028_328_000, 0.0, "sd3"),
    "sd35-large": ({0: (38, 2432)}, 8_056_627_520, 0.0, "sd3"),
    "prx-1.2b": ({0: (16, 1792)}, 1_170_691_648, 0.0, "prx"),
    "z-image": ({0: (32, 3840)}, 6_154_908_736, 0.0, "zimage"),
    "qwen-image": ({0: (60, 3072)}, 20_430_401_088, 0.0, "qwenimage"),
    "lumina-image-2": ({0: (28, 2304)}, 2_609_769_152, 0.0, "lumina2"),
    "flux1-dev": ({0: (57, 3072)}, 11_901_408_320, 0.0, "flux"),
    "flux1-schnell": ({0: (57, 3072)}, 11_891_178_560, 0.0, "flux"),
    "chroma1-hd": ({0: (57, 3072)}, 8_899_983_424, 0.0, "chroma"),
    "ddpm-256": ({4: (5, 512), 5: (1, 512)}, 113_673_219, 6.3, "ddpm"),
    "controlnet-sd15": (
        {0: (2, 320), 1: (2, 640), 2: (2, 1280), 3: (1, 1280)}, 361_279_120, 23.8
    ),
    "controlnet-sdxl": ({1: (4, 640), 2: (30, 1280)}, 1_251_014_160, 203.2),
}  # fmt: skip


@pytest.mark.parametrize("name", full_size_configs())
def test_full_size_layouts_on_meta(name):
    levels, parameters, attention, *preset = LAYOUTS[name]
    model = denoiser_on_meta(*full_size_configs()[name])
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
    status = convfusion.convert(model)
    found = {}
    for row in status.sites:
        count = found.get(row.site.level, (0, 0))[0]
        found[row.site.level] = (count + 1, row.site.channels)
    assert found == levels
    weights = sum(row.attention_parameters for row in status.sites)
    assert round(weights / 1e6, 1) == attention
    assert convfusion.surgery.presets.choose_preset(model) == (preset or [name])[0]


def test_patterns_choose_sites():
    model = sd15()
    config = ConvertConfig(
        sites={"*.attentions.0.*attn1": DeltaConv(kernel_size=3), "mid_block.*": MeanOnly()}
    )
    status = convfusion.convert(model, config)
    kinds = {row.site.path: type(row.mixer) for row in status.sites}
    assert status.converted == 7
    assert kinds["up_blocks.1.attentions.1.transformer_blocks.0.attn1"] is type(None)
    # The middle site matches both patterns: the first one decides.
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1"] is DeltaConv
    convfusion.revert(model)
    assert convfusion.status(model).converted == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AuraFlowTransformer2DModel(
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=1,
                joint_attention_dim=8,
                caption_projection_dim=8,
                pos_embed_max_size=16,
            ),
            "AuraFlowTransformer2DModel is not supported; supported are ChromaTransformer2D",
        ),
        (lambda: nn.Linear(2, 2), "Linear is not supported"),
        (lambda: "a path", "str has no `unet` or `transformer`"),
        (
            lambda: UNet2DConditionModel(
                block_out_channels=(8, 8),
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                mid_block_type=None,
                norm_num_groups=8,
            ),
            "no self-attention",
        ),
    ],
)
def test_unsupported_models_raise_and_stay_as_they_are(make, message):
    model = make()
    modules = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(convfusion.UnsupportedModelError, match=message):
        convfusion.convert(model)
    if modules:
        assert [type(m) for m in model.modules()] == modules


def test_mistakes_change_nothing():
    model = sd15()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConvFusionError, match="not converted"):
        convfusion.revert(model)
    with pytest.raises(ConvFusionError, match="matches no"):
        convfusion.convert(model, ConvertConfig(sites={"up_blocks.9.*": DeltaConv()}))
    with pytest.raises(ConvFusionError, match="even integer"):
        convfusion.convert(model, uniform(DeltaConv(ratio=0.1)))
    with pytest.raises(ConvFusionError, match="no preset 'sd4'"):
        convfusion.convert(model, "sd4")
    assert [type(m) for m in model.modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())
    convfusion.convert(model)
    after = [type(m) for m in model.modules()]
    with pytest.raises(ConvFusionError, match="converted already"):
        convfusion.convert(model)
    assert [type(m) for m in model.modules()] == after


def test_calling_forward_directly_says_what_to_do():
    case = CASES[3]
    model = converted(case)
    with pytest.raises(ConvFusionError, match=r"call the denoiser itself"):
        model.forward(**case.inputs(16, 16))


def test_random_state_is_left_alone_and_seed_decides(monkeypatch):
    def refuse(seed):
        raise AssertionError("the random state of the GPUs is touched")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    model = sd15()
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    state = torch.get_rng_state()
    convfusion.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    convfusion.convert(twin)
    convfusion.convert(other, ConvertConfig(seed=1))
    first, same, different = (
        torch.cat([p.flatten() for mixer in mixers_of(m).values() for p in mixer.parameters()])
        for m in (model, twin, other)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, different)


SHORT = {
    "unet": two_levels,
    "controlnet": short_controlnet,
    "ltx2": short_ltx2,
    "qwenimage": partial(qwenimage, num_layers=1),
}
# Lumina 2 goes by numbers that it counts from a mask, and Z-Image takes long: their blocks are
# compiled in `test_joint_singles.py`.
IN_PARTS = {"lumina2", "zimage"}


def first_of_each_family() -> list[Case]:
    """One model of each family, with fewer layers where it has many."""
    cases = {family_of(shapes_of(case.make)).name: case for case in reversed(CASES)}
    return [
        replace(case, make=SHORT.get(name, case.make))
        for name, case in cases.items()
        if name not in IN_PARTS
    ]


@pytest.mark.parametrize("case", first_of_each_family(), ids=lambda case: case.name)
@torch.no_grad()
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_a_converted_model_compiles_whole(case):
    """With a block at one site; what blocks compute is compiled in the tests of the blocks.

    The sides are dynamic from the first call on, and are not taken for others of the same number:
    so the second size needs no compilation of its own.
    """
    first = list_sites(shapes_of(case.make))[0].path
    model = converted(case, ConvertConfig({first: DeltaConv(kernel_size=3, stages=1)}))
    expected = [run(model, case, *size) for size in case.sizes]
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager")
    for size, output in zip(case.sizes, expected, strict=True):
        inputs = {**case.inputs(*size), **case.told_grid(*size)}
        latents = inputs[family_of(model).latents]
        torch._dynamo.maybe_mark_dynamic(latents, (latents.ndim - 2, latents.ndim - 1))
        for grid in inputs.get("joint_attention_kwargs", {}).values():
            torch._dynamo.maybe_mark_dynamic(grid, (0, 1))
        found = first_output(model(**inputs))
        torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-5)
