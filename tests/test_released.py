"""The authors' released weights: what a file in their layout computes, and what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released_files import reference_block, release
from safetensors.torch import save_file
from tiny_models import CASES, run, sd15
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import CheckpointError, ConvFusionError, DeltaConv, cli
from convfusion.checkpoint import BLOCKS, MANIFEST
from convfusion.families import list_sites
from convfusion.files import read_tensors
from convfusion.surgery import mixers_of

BY_NAME = {case.name: case for case in CASES}
GATES = {"sd15": "reference", "sdxl": "reference", "pixart": "sigmoid"}
SITE = "mid_block.attentions.0.transformer_blocks.0"


def write(path, *groups, **others):
    tensors = {name: tensor for group in groups for name, tensor in group.items()}
    save_file({**tensors, **others}, path)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "ConvFusion-sd15-1.safetensors", release(sd15()))


def as_described(model, tensors, case, gate, size):
    """The output of a model whose self-attention is the plain form of the reference block."""
    levels = {site.path: site.level for site in list_sites(model)}
    patch = 2 if case.name == "pixart" else 1
    for path, level in levels.items():
        prefix = path.removesuffix("attn1") + "conv1."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        grid = tuple(-(-side // (patch * 2**level)) for side in size)

        def forward(tokens, *args, weights=weights, grid=grid, **kwargs):
            return reference_block(weights, tokens, grid, gate)

        model.get_submodule(path).forward = forward
    return run(model, case, *size)


# 24×40 is 3×5 at the last level of a UNet; PixArt's patches take even sides.
SIZES = [("sd15", (24, 40)), ("sd15", (17, 23)), ("sdxl", (18, 14)), ("pixart", (12, 14))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "size"), SIZES)
@torch.no_grad()
def test_a_released_file_computes_what_is_described(name, size, bias, tmp_path):
    case = BY_NAME[name]
    tensors = release(case.model(), bias=bias)
    model = case.model()
    status = convfusion.load(model, write(tmp_path / "file.safetensors", tensors))
    assert status.converted == case.sites
    expected = as_described(case.model(), tensors, case, GATES[name], size)
    torch.testing.assert_close(run(model, case, *size), expected, rtol=1e-3, atol=1e-4)
    convfusion.revert(model)
    assert torch.equal(run(model, case, *size), run(case.model(), case, *size))


@settings(deadline=None, max_examples=30)
@given(
    grid=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    side=st.integers(0, 3).map(lambda half: 2 * half + 1),
    stages=st.integers(1, 3),
    family=st.sampled_from(["unet", "pixart"]),
    seed=st.integers(0, 999),
)
def test_a_block_equals_the_plain_form_on_any_grid(
    tmp_path_factory, grid, side, stages, family, seed
):
    model = BY_NAME["sd15" if family == "unet" else "pixart"].model()
    tensors = release(model, kernel=side, stages=stages, ratio=0.25, seed=seed)
    convfusion.load(model, write(tmp_path_factory.mktemp("one") / "a.safetensors", tensors))
    path, mixer = next(iter(mixers_of(model).items()))
    gate = "reference" if family == "unet" else "sigmoid"
    assert mixer.config == DeltaConv(
        kernel_size=side, stages=stages, ratio=0.25, gate=gate, pooling="adaptive", init="random"
    )
    channels = mixer.proj_out.bias.shape[0]
    tokens = torch.randn(2, grid[0] * grid[1], channels)
    prefix = path.removesuffix("attn1") + "conv1."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    with torch.no_grad():
        found = mixer(tokens, grid)
    expected = reference_block(weights, tokens, grid, gate)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_biases_of_the_kernels_come_back_and_keep_to_the_plain_path(tmp_path):
    model, again = sd15(), sd15()
    tensors = release(sd15(), bias=True)
    convfusion.load(model, write(tmp_path / "a.safetensors", tensors))
    mixer = mixers_of(model)[f"{SITE}.attn1"]
    assert (
        mixer.config.conv_bias and mixer.list_stage_weights() == []
    )  # the fused one knows no bias
    assert torch.equal(mixer.convs[1].bias, tensors[f"{SITE}.conv1.gates.1.conv_spatial.bias"])
    convfusion.save(model, tmp_path / "blocks")
    convfusion.load(again, tmp_path / "blocks")
    found = mixers_of(again)[f"{SITE}.attn1"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in mixer.state_dict().items())


def test_kernel_sizes_come_from_the_file(tmp_path):
    sides = {"down_blocks.0": 7, "down_blocks.1": 9, "down_blocks.2": 5, "mid_block": 3}
    sides |= {"up_blocks.1": 5, "up_blocks.2": 9, "up_blocks.3": 11}
    model = sd15()
    tensors = release(model, kernel=lambda b: next(k for p, k in sides.items() if b.startswith(p)))
    status = convfusion.load(model, write(tmp_path / "a.safetensors", tensors))
    preset = convfusion.surgery.presets.get_preset("sd15").mixers_for(
        row.site.path for row in status.sites
    )
    found = {row.site.path: row.mixer.kernel_size for row in status.sites}
    assert found == {path: mixer.kernel_size for path, mixer in preset.items()}


def loaded(path, **options):
    model = sd15()
    convfusion.load(model, path, **options)
    return mixers_of(model)[f"{SITE}.attn1"].proj_in.weight


def test_of_both_groups_the_average_is_taken_unless_told_otherwise(tmp_path):
    both = release(sd15(), group="base:"), release(sd15(), group="base_ema:", seed=1)
    numbers = {"step$int": torch.tensor(132000), "base_ema:decay$float": torch.tensor(0.99)}
    path = write(tmp_path / "both.safetensors", *both, **numbers)
    name = f"{SITE}.conv1.conv_up.weight"
    assert torch.equal(loaded(path), both[1][f"base_ema:{name}"])
    assert torch.equal(loaded(path, average=False), both[0][f"base:{name}"])
    for group in ("base:", "base_ema:", "denoiser.", "base:denoiser.module."):
        path = write(tmp_path / "one.safetensors", release(sd15(), group=group, seed=2))
        assert torch.equal(loaded(path), release(sd15(), seed=2)[name])
    path = write(tmp_path / "average.safetensors", both[1])
    with pytest.raises(CheckpointError, match="moving average only"):
        loaded(path, average=False)
    path = write(tmp_path / "several.safetensors", both[0], release(sd15(), group="other:"))
    with pytest.raises(CheckpointError, match="several models, under 'base:', 'other:'"):
        loaded(path)


def test_values_take_the_models_dtype_and_a_second_load_updates(file, tmp_path):
    model = sd15().to(torch.bfloat16)
    convfusion.load(model, file)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    half = {k: v.half() for k, v in release(sd15(), seed=5).items()}
    status = convfusion.load(model, write(tmp_path / "b.safetensors", half), keep_attention=False)
    assert not any(row.attention_kept for row in status.sites)
    name = f"{SITE}.conv1.conv_out.bias"
    found = mixers_of(model)[f"{SITE}.attn1"].proj_out.bias
    assert torch.equal(found, half[name].to(torch.bfloat16))


@torch.no_grad()
def test_it_is_kept_in_our_format(file, tmp_path):
    case = BY_NAME["sd15"]
    model, again = case.model(), case.model()
    convfusion.load(model, file)
    convfusion.save(model, tmp_path / "blocks")
    convfusion.load(again, tmp_path / "blocks")
    assert torch.equal(run(model, case, 17, 23), run(again, case, 17, 23))
    site = json.loads((tmp_path / "blocks" / MANIFEST).read_text())["sites"][f"{SITE}.attn1"]
    assert site["mixer"]["gate"] == "reference" and site["mixer"]["pooling"] == "adaptive"


CONV = f"{SITE}.conv1"


def without(name):
    return lambda tensors: tensors.pop(f"{CONV}.{name}")


def reshaped(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({f"{CONV}.{name}": torch.zeros(shape, dtype=dtype)})


DAMAGE = {
    "a tensor too few": (without("conv_pool.bias"), rf"{CONV} lacks conv_pool\.bias"),
    "no bias": (without("conv_up.bias"), rf"{CONV} lacks conv_up\.bias"),
    "no first stage": (without("gates.0.conv_spatial.weight"), r"stages \[1\]: they must count"),
    "no stage": (
        lambda t: [t.pop(f"{CONV}.gates.{i}.conv_spatial.weight") for i in (0, 1)],
        r"stages \[\]",
    ),
    "a block too few": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(CONV)],
        f"lacks the blocks of {SITE}",
    ),
    "a block too many": (
        lambda t: t.update(
            {"up_blocks.9.attentions.0.transformer_blocks.0.conv1.x": torch.ones(1)}
        ),
        "blocks that this model lacks: up_blocks.9",
    ),
    "a tensor too many": (reshaped("gates.0.conv_spatial.bias", 8), "no block has: gates.0"),
    "a bias of another size": (
        lambda t: [reshaped(f"gates.{i}.conv_spatial.bias", 7)(t) for i in (0, 1)],
        r"bias is F32 of shape \(7,\), expected",
    ),
    "another tensor": (
        lambda t: t.update({"conv_in.weight": torch.ones(1)}),
        "to no block: conv_in",
    ),
    "channels first": (
        reshaped("gates.1.conv_spatial.weight", 8, 1, 3, 3),
        r"expected .* \(3, 3, 8",
    ),
    "an oblong kernel": (reshaped("gates.1.conv_spatial.weight", 3, 5, 8), r"\(3, 3, 8\)"),
    "a scalar": (
        reshaped("conv_up.bias"),
        r"conv_up\.bias is F32 of shape \(\), expected .* \(8,\)",
    ),
    "an even kernel": (
        lambda t: [reshaped(f"gates.{i}.conv_spatial.weight", 4, 4, 8)(t) for i in (0, 1)],
        "kernels of side 4",
    ),
    "integers": (reshaped("conv_up.bias", 8, dtype=torch.int32), "is I32 of shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_named_and_the_model_stays_as_it_was(damage, tmp_path):
    inflict, message = DAMAGE[damage]
    tensors = release(sd15())
    inflict(tensors)
    path = write(tmp_path / "a.safetensors", tensors)
    model = sd15()
    kinds, before = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        convfusion.load(model, path)
    assert [type(m) for m in model.modules()] == kinds and list(model.state_dict()) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


# Which file, into which model, and what is said. All but SD2.1 differ from SD1.5 in their sites.
WRONG = [
    ("sd15", "sdxl", "has blocks that this model lacks"),
    ("sdxl", "sd15", "has blocks that this model lacks"),
    ("sd15", "pixart", "has blocks that this model lacks"),
    ("pixart", "sd15", "has blocks that this model lacks"),
    ("sd15", "sd21", "for SD1.x, SDXL and PixArt, and this is .* layout sd21"),
    ("pixart", "dit", "for SD1.x, SDXL and PixArt, and this is a DiT"),
]


@pytest.mark.parametrize(("source", "target", "message"), WRONG)
def test_a_file_for_another_base_is_refused(source, target, message, tmp_path):
    path = write(tmp_path / "a.safetensors", release(BY_NAME[source].model()))
    model = BY_NAME[target].model()
    with pytest.raises(CheckpointError, match=message):
        convfusion.load(model, path)
    assert convfusion.status(model).converted == 0


def test_other_files_are_refused(file, tmp_path):
    model = sd15()
    with pytest.raises(CheckpointError, match="cannot be read"):
        convfusion.load(model, tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convfusion.load(model, file)
    convfusion.convert(model)
    with pytest.raises(ConvFusionError, match="converted otherwise"):
        convfusion.load(model, write(tmp_path / "b.safetensors", release(sd15())))


def test_one_command_brings_it_into_our_format(tmp_path, monkeypatch, capsys):
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "model")
    both = release(pipe.unet, group="base:"), release(pipe.unet, group="base_ema:", seed=1)
    file = write(tmp_path / "both.safetensors", *both)
    for options, group in (([], both[1]), (["--no-average"], both[0])):
        out = tmp_path / f"out{len(options)}"
        command = ["convert", tmp_path / "model", "--blocks", file, "--out", out, "--blocks-only"]
        monkeypatch.setattr("sys.argv", ["convfusion", *map(str, command), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr().err
        assert {each.name for each in out.iterdir()} == {MANIFEST, BLOCKS}
        found = read_tensors(out / BLOCKS)[f"{SITE}.attn1.mixer.proj_in.weight"]
        expected = next(t for name, t in group.items() if f"{SITE}.conv1.conv_up.weight" in name)
        assert torch.equal(found, expected)
