"""LTX-Video and LTX-2: where their packed tokens lie, and what a converted site refuses."""

import pytest
import torch
from tiny_models import ltx, ltx2
from tiny_pipelines import ltx_video_8x

import convfusion
from convfusion import ConvertConfig, ConvFusionError, Halo, MeanOnly, Removed, uniform
from convfusion.families import example_inputs
from convfusion.families.coordinates import read_coordinates
from convfusion.families.watch import sample_attention
from convfusion.mixers.base import fold_gates
from convfusion.mixers.tokens import TokenSample
from convfusion.recording import record_calls
from convfusion.surgery import attention_back, mixers_of

GRID = (2, 3, 4)
NEAR = Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(1, 2, 2))
# What LTX-2.3 has beside LTX-2: gates, guidance by perturbation, text without projections.
NEWER = {
    "rope_type": "interleaved",
    "perturbed_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
}


def places(grid, bounds=False, scale=(1.0, 32.0, 32.0)):
    """Where the tokens of a video lie, [2, 3, N] or with the bounds of each patch."""
    axes = [torch.arange(side) * unit for side, unit in zip(grid, scale, strict=True)]
    starts = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).expand(2, -1, -1)
    return torch.stack([starts, starts + 1], dim=-1) if bounds else starts


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 1, 5), (4, 1, 1), (1, 6, 2), (3, 3, 3)])
@pytest.mark.parametrize("bounds", [False, True])
def test_the_grid_is_read_from_where_the_tokens_lie(grid, bounds):
    assert read_coordinates(places(grid, bounds)) == grid


@pytest.mark.parametrize("extra", [places((1, 3, 4)) + 0.25, places((2, 3, 4)), places((1, 1, 1))])
def test_tokens_beside_the_video_are_refused(extra):
    with pytest.raises(ConvFusionError, match="do not lie on one grid of frames"):
        read_coordinates(torch.cat([places(GRID), extra], dim=2))


@pytest.mark.parametrize("sides", [None, 1])
@torch.no_grad()
def test_coordinates_alone_tell_the_grid(sides):
    """Also beside sides of 1, as the pipeline of long videos gives them."""
    torch.manual_seed(0)
    model = ltx().eval()
    convfusion.convert(model, uniform(NEAR))
    inputs = example_inputs(model, GRID, batch=2, words=3)
    inputs["video_coords"] = places(GRID)
    expected = model(**inputs)[0]
    told = {**inputs, **dict.fromkeys(("num_frames", "height", "width"), sides)}
    assert torch.equal(model(**told)[0], expected)
    with pytest.raises(ConvFusionError, match="must be told num_frames, height and width"):
        model(**{**told, "video_coords": None, "num_frames": None})


@pytest.mark.parametrize("options", [{}, NEWER], ids=["2.0", "2.3"])
@torch.no_grad()
def test_sound_and_text_keep_their_attention(options):
    torch.manual_seed(0)
    model = ltx2(**options).eval()
    inputs = example_inputs(model, GRID, batch=2, words=3)
    video, sound = model(**inputs)
    status = convfusion.convert(model, ConvertConfig({"transformer_blocks.0.*": NEAR}))
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "Mixed" in str(type(m))}
    assert kinds == {"transformer_blocks.0.attn1": "MixedLTX2Attention"}
    assert status.converted == 1 and len(status.sites) == 2
    changed, heard = model(**inputs)
    assert not torch.equal(changed, video) and not torch.equal(heard, sound)
    with attention_back(model, ["transformer_blocks.0.attn1"]):
        assert all(map(torch.equal, model(**inputs), (video, sound)))


@torch.no_grad()
def test_what_would_go_unnoticed_is_refused():
    torch.manual_seed(0)
    model = ltx2(**NEWER).eval()
    inputs = example_inputs(model, GRID, batch=2, words=3)
    perturbed = {**inputs, "spatio_temporal_guidance_blocks": [1]}
    expected = model(**perturbed)
    convfusion.convert(model, ConvertConfig({"transformer_blocks.1.*": Removed()}))
    with pytest.raises(ConvFusionError, match=r"perturbs the self-attention, and .*1.attn1 is"):
        model(**perturbed)
    with attention_back(model, ["transformer_blocks.1.attn1"]):
        assert all(map(torch.equal, model(**perturbed), expected))
    mask = torch.ones(2, 24, 24)
    with pytest.raises(ConvFusionError, match="takes no mask"):
        model(**inputs, video_self_attention_mask=mask)


@torch.no_grad()
def test_gates_are_dropped_with_the_attention_and_go_into_a_start():
    torch.manual_seed(0)
    model = ltx2().eval()
    attention = model.transformer_blocks[0].attn1
    attention.to_gate_logits.weight.zero_()
    attention.to_gate_logits.bias.copy_(torch.tensor([1.0, -1.0]))
    attention.to_q.weight.zero_(), attention.to_q.bias.zero_()
    tokens = torch.randn(2, 24, 24)
    expected, weight = attention(tokens), attention.to_out[0].weight.clone()
    convfusion.convert(model, uniform(MeanOnly()))
    mixer = mixers_of(model)["transformer_blocks.0.attn1"]
    torch.testing.assert_close(mixer(tokens, GRID), expected)
    assert torch.equal(attention.to_out[0].weight, weight)
    convfusion.drop_attention(model)
    assert not [name for name, _ in attention.named_parameters() if not name.startswith("mixer.")]


@torch.no_grad()
def test_gates_of_a_measured_start_are_the_mean_of_the_sample():
    torch.manual_seed(0)
    model = ltx2().eval()
    attention = model.transformer_blocks[0].attn1
    attention.to_gate_logits.weight.mul_(5)
    tokens = torch.randn(2, 24, 24) + 1
    folded = fold_gates(attention, [TokenSample(tokens, GRID)])
    gates = 2 * attention.to_gate_logits(tokens).sigmoid().mean((0, 1))  # [h]
    expected = attention.to_out[0].weight.unflatten(1, (2, 12)) * gates[:, None]
    torch.testing.assert_close(folded.to_out[0].weight, expected.flatten(1))
    assert folded.to_gate_logits is None and attention.to_gate_logits is not None


@torch.no_grad()
def test_blocks_start_from_what_the_pipeline_draws():
    pipe = ltx_video_8x()
    clip = {"steps": 2, "guidance": 2.0, "size": (32, 64), "frames": 5, "looks": 2}
    calls = record_calls(pipe, ["red"], **clip)
    convfusion.convert(pipe, uniform(NEAR))
    errors = convfusion.start_from_attention(pipe, calls)
    assert len(errors) == 2 and all(error < 1 for error in errors.values())


def test_what_changes_scores_unseen_is_refused_by_a_start():
    model = ltx2(**NEWER).eval()
    inputs = example_inputs(model, GRID, batch=2, words=3)
    mask = {"video_self_attention_mask": torch.ones(2, 24, 24)}
    guided = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.zeros(2)}
    for more, named in ((mask, "attention_mask"), (guided, "perturbation_mask")):
        with (
            pytest.raises(ConvFusionError, match=f"attends to itself with a {named}"),
            sample_attention(model, [], memory=1.0),
        ):
            model(**{**inputs, **more})


def test_clips_of_other_places_in_one_batch_are_refused_by_a_start():
    model = ltx().eval()
    inputs = example_inputs(model, GRID, batch=2, words=3)
    inputs["video_coords"] = places(GRID) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    with (
        pytest.raises(ConvFusionError, match="differs between the samples of one batch"),
        sample_attention(model, [], memory=1.0),
    ):
        model(**inputs)
