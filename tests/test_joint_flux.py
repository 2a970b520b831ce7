"""FLUX.1 and Chroma: what is particular to packed latents, single blocks, references and masks."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from tiny_models import CASES, randomise, run

import convfusion
from convfusion import ConvertConfig, ConvFusionError, uniform
from convfusion.families import example_inputs, list_sites
from convfusion.families.placed import place_tokens, read_places
from convfusion.families.watch import watch_tokens
from convfusion.mixers import Halo, Removed
from convfusion.surgery import mixers_of

CHOSEN = {case.name: case for case in CASES if case.name in ("flux", "chroma")}
FLUX, CHROMA = CHOSEN["flux"], CHOSEN["chroma"]
WHOLE = uniform(Halo(8, 16, 8, 1.0, 1.0))  # its window is larger than the grids
SMALL = uniform(Halo(2, 4, 2, 1.0, 1.0))
SIZES = [(12, 16), (18, 10)]
WORDS = 5
table = pytest.mark.parametrize("case", CHOSEN.values(), ids=lambda case: case.name)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def with_mask(size, kind):
    """Of two samples, one with padding."""
    inputs = CHROMA.inputs(*size)
    mask = inputs["attention_mask"]
    mask[0, 2:WORDS] = 0
    mask[1, WORDS - 1 : WORDS] = 0
    kinds = {"seen": mask.bool(), "added": mask, "graded": 0.7 * mask + 0.2, "none": None}
    return {**inputs, "attention_mask": kinds[kind]}


def with_references(size, sides=(3, 5)):
    """A picture of other sides behind the one that is drawn, as FLUX.1 Kontext has it."""
    inputs = FLUX.inputs(*size)
    places = place_tokens(*sides, torch.tensor([1.0, 0.0, 0.0]))
    picture = torch.randn(2, len(places), 16, generator=torch.Generator().manual_seed(3))
    return {
        **inputs,
        "hidden_states": torch.cat([inputs["hidden_states"], picture], dim=1),
        "img_ids": torch.cat([inputs["img_ids"], places]),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["seen", "added", "graded", "none"])
def test_a_mask_is_honoured_as_stock_does(kind, checkpointing):
    """Also where checkpointing leaves it out of single blocks, and with two sizes in flight."""
    model = CHROMA.model()
    if checkpointing:
        model.enable_gradient_checkpointing()
    weights = dict(model.named_parameters())

    def call():
        outputs = [model(**with_mask(size, kind))[0] for size in SIZES]
        total = sum(output.square().sum() for output in outputs)
        return outputs, torch.autograd.grad(total, list(weights.values()))

    outputs, gradients = call()
    if kind != "none":
        with torch.no_grad():
            unmasked = [model(**with_mask(size, "none"))[0] for size in SIZES]
        assert all(relative(*pair) > 1e-3 for pair in zip(unmasked, outputs, strict=True))
    convfusion.convert(model, WHOLE)
    found, learned = call()
    for pair in zip(found, outputs, strict=True):
        assert relative(*pair) < 1e-5
    for name, mine, stock in zip(weights, learned, gradients, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def test_references_are_attended_to_exactly():
    for size in SIZES:
        model, inputs = FLUX.model(), with_references(size)
        expected = model(**inputs)[0]
        without = model(**FLUX.inputs(*size))[0]
        assert relative(expected[:, : without.shape[1]], without) > 1e-2
        for config in (WHOLE, ConvertConfig({"single*.0.attn": WHOLE.sites["*"]})):
            convfusion.convert(model, config)
            assert relative(model(**inputs)[0], expected) < 1e-5
            convfusion.revert(model)
        assert torch.equal(model(**inputs)[0], expected)


def see_attention(model, path, inputs):
    """What the attention at a path returns in a call of the model, as one sequence, text first."""
    seen = []
    attention = model.get_submodule(path)
    handle = attention.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs)
    handle.remove()
    (output,) = seen
    return torch.cat(output[::-1], dim=1) if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", ["flux", "references", "seen", "added"])
@torch.no_grad()
def test_all_rows_but_those_of_the_picture_are_exact(kind):
    size = SIZES[0]
    case = CHROMA if kind in ("seen", "added") else FLUX
    inputs = {"flux": FLUX.inputs, "references": with_references}.get(
        kind, lambda *size: with_mask(size, kind)
    )
    given = inputs(size) if kind == "references" else inputs(*size)
    own = slice(WORDS, WORDS + 48)
    for path in ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"):
        model = case.model()
        stock = see_attention(model, path, given)
        convfusion.convert(model, ConvertConfig({path: Removed()}))
        found = see_attention(model, path, given)
        assert relative(found[:, own], stock[:, own]) > 1e-2
        for rows in (slice(0, own.start), slice(own.stop, None)):
            if stock[:, rows].numel():
                assert relative(found[:, rows], stock[:, rows]) < 1e-6


@table
@torch.no_grad()
def test_a_tap_shows_the_hidden_state_behind_its_block(case):
    """Which is what came in, where the attention is made to add nothing."""
    model = case.model()
    for site in list_sites(model):
        block = model.get_submodule(site.block)
        for layer in (block.attn.to_out[0] if hasattr(block.attn, "to_out") else block.proj_out,):
            layer.weight.zero_()
            layer.bias.zero_()
    seen = {}

    def keep(module, args, kwargs, name):
        named = kwargs.get("hidden_states", args[0] if args else None)
        seen[name] = args[0] if args else named

    for site in list_sites(model):
        for path in (site.block, site.tap):
            model.get_submodule(path).register_forward_pre_hook(
                lambda *call, path=path: keep(*call, path), with_kwargs=True
            )
    run(model, case, *SIZES[0])
    for site in list_sites(model):
        before, after = seen[site.block], seen[site.tap]
        assert torch.equal(before[:, -48:], after[:, -48:]), site.path


@table
@torch.no_grad()
def test_a_grid_that_is_given_is_taken(case):
    """Though places say something else, or are not known on the host."""
    model = case.model()
    convfusion.convert(model, SMALL)
    randomise(mixers_of(model))
    inputs, other = case.inputs(12, 16), torch.empty(8, 6, 0)
    inputs["img_ids"] = torch.zeros_like(inputs["img_ids"])
    found = model(**inputs, joint_attention_kwargs={"grid": other})[0]
    with pytest.raises(ConvFusionError, match="do not lie row by row on a grid"):
        model(**inputs)
    assert (
        relative(model(**inputs, joint_attention_kwargs={"grid": torch.empty(6, 8, 0)})[0], found)
        > 1e-3
    )
    for wrong in ((6, 6), (9, 8)):
        with pytest.raises(
            ConvFusionError, match=r"was given 48 tokens of the image, but the grid"
        ):
            model(**inputs, joint_attention_kwargs={"grid": torch.empty(*wrong, 0)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_is_read_from_places(dtype):
    for sides in ((1, 1), (1, 7), (7, 1), (300, 3), (3, 300), (270, 260)):
        assert read_places(place_tokens(*sides).to(dtype)) == sides
    moved = place_tokens(4, 6, torch.tensor([0.0, 10.0, 20.0])).to(dtype)  # a part of a picture
    assert read_places(torch.cat([moved, moved + 1])) == (4, 6)


@pytest.mark.parametrize("wrong", ["columns first", "one is missing", "two pictures", "rounded"])
def test_places_on_no_grid_are_refused(wrong):
    places = place_tokens(4, 6)
    if wrong == "columns first":
        places = places[:, [0, 2, 1]]
    elif wrong == "one is missing":
        places = places[:-1]
    elif wrong == "two pictures":
        places = torch.cat([places, places])
    else:
        places = place_tokens(4, 6, torch.tensor([0.0, 256.0, 256.0])).bfloat16()
    with pytest.raises(ConvFusionError, match="tokens of the picture do not lie row by row"):
        read_places(places)


@torch.no_grad()
def test_what_a_converted_model_cannot_do_is_refused_by_name():
    model, inputs = FLUX.model(), FLUX.inputs(*SIZES[0])
    convfusion.convert(model)
    with pytest.raises(ConvFusionError, match=r"must be told where its tokens lie \(img_ids\)"):
        model(**{**inputs, "img_ids": None})
    mask = torch.ones(1, 1, 1, WORDS + 48, dtype=torch.bool)
    with pytest.raises(ConvFusionError, match="takes no attention_mask, as of prompts for parts"):
        model(**inputs, joint_attention_kwargs={"attention_mask": mask})
    convfusion.revert(model)
    with (
        watch_tokens(model, lambda *seen: None),
        pytest.raises(ConvFusionError, match="analysis and measured starts know no pictures"),
    ):
        model(**with_references(SIZES[0]))
    model, inputs = CHROMA.model(), with_mask(SIZES[0], "added")
    convfusion.convert(model)
    inputs["attention_mask"][0, -1] = 0
    for mask in (inputs["attention_mask"], inputs["attention_mask"].bool()):
        with pytest.raises(ConvFusionError, match="leaves out a part of the picture"):
            model(**{**inputs, "attention_mask": mask})


@table
@torch.no_grad()
def test_ip_adapters_and_fused_projections_are_refused(case):
    model, path = case.model(), "transformer_blocks.0.attn"
    attention = model.get_submodule(path)
    attention.set_processor(FluxIPAdapterAttnProcessor(16, 8))
    with pytest.raises(ConvFusionError, match=f"{path} has the processor FluxIPAdapterAttnProc"):
        convfusion.convert(model)
    model = case.model()
    convfusion.convert(model)
    model.get_submodule(path).set_processor(FluxIPAdapterAttnProcessor(16, 8))
    with pytest.raises(ConvFusionError, match=f"{path} has the processor FluxIPAdapterAttnProc"):
        run(model, case, *SIZES[0])
    for order in ("before", "after"):
        model = case.model()
        if order == "after":
            convfusion.convert(model)
        for module in model.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections()
        with pytest.raises(ConvFusionError, match=r"are fused: call unfuse_qkv_projections\(\)"):
            convfusion.convert(model) if order == "before" else run(model, case, *SIZES[0])


@torch.no_grad()
def test_bfloat16_is_as_far_from_float32_as_stock():
    exact = CHROMA.model()(**with_mask(SIZES[0], "seen"))[0]
    model = CHROMA.model().bfloat16()
    inputs = {
        name: value.bfloat16()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in with_mask(SIZES[0], "seen").items()
    }
    stock = relative(model(**inputs)[0].float(), exact)
    convfusion.convert(model, WHOLE)
    assert relative(model(**inputs)[0].float(), exact) < 1.5 * stock


def test_examples_of_other_texts_and_batches():
    inputs = example_inputs(FLUX.model(), (6, 10), batch=3)
    assert inputs["hidden_states"].shape == (3, 15, 16)
    assert inputs["encoder_hidden_states"].shape[1] == len(inputs["txt_ids"]) == 512
