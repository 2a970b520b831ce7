"""Wan and its siblings: first frames, times of tokens, blocks that move; and blocks of videos."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2Transformer3DModel,
    WanPipeline,
)
from tiny_models import WAN, randomise, run_video, skyreels, vace, wan, wan_image

import convfusion
from convfusion import ConvFusionError, DeltaConv, MeanOnly, uniform
from convfusion.bench.models import bench_model
from convfusion.errors import UnsupportedModelError
from convfusion.families import check_captioned, example_inputs, list_sites, site_grid
from convfusion.mixers import mixer_from_dict, mixer_to_dict
from convfusion.operations import site_operations
from convfusion.surgery import mixers_of

VIDEO = DeltaConv(kernel_size=3, frame_kernel_size=3, first_frame_branch=True)
SIZE = (3, 8, 12)


def seeded(make, seed=1):
    torch.manual_seed(seed)
    return make().eval()


def converted(make):
    model = seeded(make)
    convfusion.convert(model, uniform(VIDEO))
    randomise(mixers_of(model), std=0.1)
    return model


@torch.no_grad()
def test_the_picture_of_a_first_frame_is_still_looked_at():
    """It comes with the text, into the cross-attention, which stays as it is."""
    model = converted(wan_image)
    inputs = example_inputs(model, SIZE, batch=2)
    expected = model(**inputs)[0]
    picture = "encoder_hidden_states_image"
    inputs[picture] = inputs[picture] + 1.0
    assert not torch.allclose(model(**inputs)[0], expected)
    attention = seeded(wan_image).blocks[0].attn2
    assert type(model.blocks[0].attn2) is type(attention)
    kept = model.blocks[0].attn2.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in attention.state_dict().items())


@torch.no_grad()
def test_every_token_may_have_a_timestep_of_its_own():
    """As in Wan 2.2 5B, where the tokens of a given first frame are at time 0."""
    model = converted(wan)
    inputs = example_inputs(model, SIZE, batch=2)
    expected = model(**inputs)[0]
    tokens = 3 * 4 * 6
    inputs["timestep"] = inputs["timestep"][:, None].expand(-1, tokens)
    torch.testing.assert_close(model(**inputs)[0], expected)
    first_frame = torch.arange(tokens) < 4 * 6
    inputs["timestep"] = inputs["timestep"].masked_fill(first_frame, 0)
    assert not torch.allclose(model(**inputs)[0], expected)
    convfusion.revert(model)
    assert torch.equal(model(**inputs)[0], seeded(wan)(**inputs)[0])


@torch.no_grad()
def test_frames_of_skyreels_may_be_at_other_times():
    model = converted(skyreels)
    inputs = example_inputs(model, SIZE)
    inputs |= {"timestep": torch.tensor([[100, 500, 900]]), "enable_diffusion_forcing": True}
    mixed = model(**inputs)[0]
    assert mixed.isfinite().all()
    assert not torch.allclose(mixed, seeded(skyreels)(**inputs)[0], rtol=0.01)


def test_causal_attention_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="attends causally, 3 frames at a time"):
        convfusion.convert(SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=3))
    model = converted(skyreels)
    model._set_ar_attention(3)  # as its pipeline does
    with pytest.raises(ConvFusionError, match="takes no mask, as of causal attention"):
        run_video(model, *SIZE)


@pytest.mark.parametrize("sibling", [skyreels, vace, wan_image])
@torch.no_grad()
def test_blocks_of_a_wan_fit_its_siblings(sibling, tmp_path):
    model = seeded(sibling)
    trained = converted(wan)
    convfusion.save(trained, tmp_path / "blocks")
    status = convfusion.load(model, tmp_path / "blocks")
    mine, theirs = mixers_of(model), mixers_of(trained)
    assert mine.keys() == theirs.keys() and status.converted == 2
    for path, mixer in theirs.items():
        loaded = mine[path].state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in mixer.state_dict().items())
    convfusion.save(model, tmp_path / "back")
    convfusion.revert(trained)
    assert convfusion.load(trained, tmp_path / "back").converted == 2
    assert run_video(model, *SIZE).isfinite().all()


def test_blocks_for_a_video_to_be_edited_do_not_fit_a_wan(tmp_path):
    convfusion.save(converted(vace), tmp_path / "blocks")
    with pytest.raises(ConvFusionError, match=r"site that this model lacks: vace_blocks.0.attn1"):
        convfusion.load(seeded(wan), tmp_path / "blocks")


@torch.no_grad()
def test_a_converted_skyreels_draws_what_a_wan_of_its_weights_draws():
    """The two classes are one layout: without numbers of frames a second, one model."""
    theirs, own = seeded(wan), SkyReelsV2Transformer3DModel(**WAN).eval()
    own.load_state_dict(theirs.state_dict())
    inputs = example_inputs(theirs, SIZE, batch=2, words=5)
    for model in (theirs, own):
        convfusion.convert(model, uniform(MeanOnly()))
    torch.testing.assert_close(own(**inputs)[0], theirs(**inputs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "grid", "tokens"),
    [
        ("wan-1.3b", (480, 832), (21, 30, 52), 32_760),
        ("wan-14b", (720, 1280), (21, 45, 80), 75_600),
        ("wan2.2-5b", (704, 1280), (21, 22, 40), 18_480),
        ("wan-vace-14b", (480, 832), (21, 30, 52), 32_760),
        ("skyreels-14b", (544, 960), (25, 34, 60), 51_000),
    ],
)
def test_grids_of_published_models(name, size, grid, tokens):
    model = bench_model(name)
    latents, denoiser = model.latents(size), model.denoiser
    site = list_sites(denoiser)[-1]
    assert site_grid(denoiser, site, latents) == grid
    convfusion.convert(denoiser, uniform(VIDEO))
    attention, block = site_operations(denoiser, latents)[site.path]
    assert attention == 4 * tokens * site.channels * (2 * site.channels + tokens)
    assert attention / block > 4


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
    model = seeded(wan)
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


@pytest.fixture
def two_transformers():
    """A pipeline of Wan 2.2, which changes to its second transformer for the last steps."""
    first, second = seeded(wan), seeded(wan, seed=2)
    parts = dict.fromkeys(["tokenizer", "text_encoder", "vae"])
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(
        **parts,
        scheduler=scheduler,
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.9,
    )


def draw(pipe):
    embeds = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=3,
        generator=generator,
        output_type="latent",
    )
    return drawn.frames


def test_both_transformers_are_converted_saved_loaded_and_reverted(two_transformers, tmp_path):
    pipe = two_transformers
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe)
    status = convfusion.convert(pipe, uniform(VIDEO))
    assert status.converted == status.further["transformer_2"].converted == 2
    assert "transformer_2: WanTransformer3DModel: 2 of 2 self-attention sites" in str(status)
    for number, model in enumerate((pipe.transformer, pipe.transformer_2)):
        randomise(mixers_of(model), std=0.1 + number / 10)
    drawn = draw(pipe)
    assert not torch.allclose(drawn, before)
    convfusion.save(pipe, tmp_path / "blocks")
    convfusion.revert(pipe)
    assert torch.equal(draw(pipe), before)
    convfusion.load(pipe, tmp_path / "blocks")
    assert torch.equal(draw(pipe), drawn)
    convfusion.revert(pipe.transformer_2)
    assert not torch.equal(draw(pipe), drawn)  # it has its turn
    with pytest.raises(ConvFusionError, match="converted already"):
        convfusion.convert(pipe)
    assert convfusion.status(pipe).further["transformer_2"].converted == 0
    convfusion.load(pipe.transformer_2, tmp_path / "blocks" / "transformer_2")
    assert torch.equal(draw(pipe), drawn)
    convfusion.drop_attention(pipe)
    assert torch.equal(draw(pipe), drawn)
    with pytest.raises(ConvFusionError, match="were dropped"):
        convfusion.revert(pipe)


def test_what_knows_one_denoiser_refuses_two(two_transformers, tmp_path):
    pipe = two_transformers
    convfusion.save(converted(wan), tmp_path / "one")
    with pytest.raises(ConvFusionError, match=r"has no blocks for transformer_2.*pipe.transformer"):
        convfusion.load(pipe, tmp_path / "one")
    assert convfusion.status(pipe).converted == 0
    convfusion.convert(pipe, uniform(VIDEO))
    two = "has 2 denoisers, transformer and transformer_2, and"
    with pytest.raises(ConvFusionError, match=f"{two} single files know one"):
        convfusion.save(pipe, tmp_path / "both.safetensors")
    with pytest.raises(ConvFusionError, match=f"{two} whole saved pipelines know one"):
        convfusion.save_pipeline(pipe, tmp_path / "pipe")
    with pytest.raises(ConvFusionError, match=f"{two} measured starts know one"):
        convfusion.start_from_attention(pipe, [])
    with pytest.raises(ConvFusionError, match=f"{two} caches, distillation and evaluation know"):
        check_captioned(pipe)
