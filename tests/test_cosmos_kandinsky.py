"""What is particular to Cosmos and to Kandinsky 5."""

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
)
from tiny_models import cosmos, kandinsky, randomise

import convfusion
from convfusion import ConvFusionError, DeltaConv, uniform
from convfusion.analysis import AnalysisConfig, analyze
from convfusion.bench.models import bench_model
from convfusion.errors import UnsupportedModelError
from convfusion.families import cosmos as cosmos_family
from convfusion.families import example_inputs, list_sites, site_grid
from convfusion.families.watch import sample_attention
from convfusion.surgery import mixers_of

VIDEO = DeltaConv(kernel_size=3, frame_kernel_size=3, first_frame_branch=True)
SIZE = (3, 8, 12)


def with_options(model, **options):
    """A model of the same class and configuration, but for some options."""
    kept = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model)(**kept | options)


def converted(make):
    torch.manual_seed(1)
    model = make().eval()
    convfusion.convert(model, uniform(VIDEO))
    randomise(mixers_of(model), std=0.1)
    return model


def test_a_sparse_kandinsky_is_refused_by_name():
    model = with_options(kandinsky(), attention_type="nabla")
    with pytest.raises(UnsupportedModelError, match=r"attends sparsely \(attention_type 'nabla'\)"):
        convfusion.convert(model)
    assert convfusion.status(model).converted == 0


@pytest.mark.parametrize("positional", [False, True])
@torch.no_grad()
def test_settings_of_a_sparse_mode_are_refused_in_a_call(positional):
    model = converted(kandinsky)
    inputs = example_inputs(model, SIZE, batch=2, words=5)
    expected = model(**inputs)
    order = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")
    order += ("visual_rope_pos", "text_rope_pos")
    given = [inputs[name] for name in order]
    assert torch.equal(model(*given, (1.0, 1.0, 1.0), None, False), expected)
    sparse = {"to_fractal": False, "sta_mask": None, "P": 0.9}
    with pytest.raises(ConvFusionError, match="takes no sparse_params"):
        if positional:
            model(*given, (1.0, 1.0, 1.0), sparse)
        else:
            model(**inputs, sparse_params=sparse)


@torch.no_grad()
def test_a_sparse_mode_is_refused_by_a_start():
    model = kandinsky().eval()
    sparse = {"to_fractal": False, "sta_mask": None, "P": 0.9}
    with (
        pytest.raises(ConvFusionError, match="does not attend to all of its tokens"),
        sample_attention(model, [], memory=1.0),
    ):
        model(**example_inputs(model, SIZE, words=5), sparse_params=sparse)


def test_the_text_of_kandinsky_keeps_its_self_attention():
    model = kandinsky()
    paths = {row.site.path for row in convfusion.convert(model).sites}
    assert paths == {f"visual_transformer_blocks.{number}.self_attention" for number in range(2)}
    stock = type(kandinsky().text_transformer_blocks[0].self_attention)
    assert type(model.text_transformer_blocks[0].self_attention) is stock


@torch.no_grad()
def test_cosmos_is_given_a_picture_and_a_time_for_each_frame():
    """As Predict 2.5, whose text is projected first, and 2 with given frames."""
    options = {
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 20,
        "encoder_hidden_states_channels": 16,
        "img_context_dim_in": 6,
        "img_context_num_tokens": 4,
        "img_context_dim_out": 24,
    }
    model = converted(lambda: with_options(cosmos(), **options))
    inputs = example_inputs(model, SIZE, batch=2, words=5)
    text, picture = inputs["encoder_hidden_states"]
    expected = model(**inputs)[0]
    seen = model(**{**inputs, "encoder_hidden_states": (text, picture + 1)})[0]
    assert not torch.allclose(seen, expected)
    times = inputs["timestep"][:, None, None, None, None].expand(-1, 1, SIZE[0], 1, 1)
    torch.testing.assert_close(model(**{**inputs, "timestep": times})[0], expected)


def test_a_cosmos_that_needs_torchvision_says_so(monkeypatch):
    monkeypatch.setattr(cosmos_family, "is_torchvision_available", lambda: False)
    model = bench_model("cosmos2-2b").denoiser
    with pytest.raises(ConvFusionError, match=r"needs torchvision.*: pip install torchvision"):
        example_inputs(model, (8, 8))
    monkeypatch.setattr(cosmos_family, "is_torchvision_available", lambda: True)
    assert example_inputs(model, (8, 16))["padding_mask"].shape == (1, 1, 8, 16)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("cosmos-7b", (704, 1280), (16, 44, 80)),
        ("kandinsky5-2b", (512, 768), (31, 32, 48)),
    ],
)
def test_grids_of_published_models(name, size, grid):
    model = bench_model(name)
    site = list_sites(model.denoiser)[0]
    assert site_grid(model.denoiser, site, model.latents(size)) == grid


class ToldKandinsky(Kandinsky5T2VPipeline):
    """Without text encoders: what it is told of a prompt is made up."""

    def encode_prompt(self, prompt, max_sequence_length, device, dtype):
        count = len(prompt)
        return torch.ones(count, 6, 16), torch.ones(count, 12), torch.arange(count + 1) * 6

    def check_inputs(self, **options):
        pass


def test_an_analysis_of_a_kandinsky():
    """Whose config has another name for the channels of its latents."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    pipe = ToldKandinsky(
        transformer=kandinsky().eval(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    clip = AnalysisConfig(steps=2, size=(64, 96), frames=9, filters=())
    found = analyze(pipe, ["red"], clip)
    assert [site.grid for site in found.sites] == [(3, 4, 6)] * 2
