"""UNets without captions: their attentions take maps, norm them, and add them to what they give."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny_models import ddpm, randomise

import convfusion
from convfusion import ConvFusionError, DeltaConv, Halo, uniform
from convfusion.data.cache import build_cache
from convfusion.data.sources import Prompts
from convfusion.families import example_inputs, list_sites
from convfusion.families.watch import watch_attention
from convfusion.generate import generate
from convfusion.mixers.base import project_heads, projections
from convfusion.surgery import mixers_of


@pytest.fixture
def pipe() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=None,
        norm_num_groups=4,
    )
    made = DDPMPipeline(unet.eval(), DDPMScheduler(num_train_timesteps=10))
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe):
    return pipe(
        generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np"
    ).images


def test_a_pipeline_draws_with_blocks_and_without(pipe):
    before = draw(pipe)
    assert convfusion.convert(pipe).family == "ddpm"
    randomise(mixers_of(pipe))
    assert not (draw(pipe) == before).all()
    convfusion.revert(pipe)
    assert (draw(pipe) == before).all()


@torch.no_grad()
def test_what_is_watched_is_what_the_attention_compares():
    """The tokens after its norm, so that its output can be worked out from them."""
    model, outputs, seen = ddpm().eval(), {}, {}
    for site in list_sites(model):

        def keep(module, args, output, path=site.path):
            outputs[path] = (args[0], output)

        model.get_submodule(site.path).register_forward_hook(keep)

    def see(site, attention, sample):
        seen[site.path] = (attention, sample)

    with watch_attention(model, see):
        model(**example_inputs(model, (8, 12), batch=2))
    for path, (attention, sample) in seen.items():
        query, key, value = project_heads(attention, sample)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = projections(attention)[3](mixed.transpose(1, 2).flatten(2))
        maps, output = outputs[path]
        torch.testing.assert_close(mixed.transpose(1, 2).unflatten(2, sample.grid) + maps, output)
    assert len(seen) == 4


@torch.no_grad()
def test_a_halo_block_of_full_rank_starts_as_the_attention():
    """In a window over the whole grid it is the attention itself."""
    model = ddpm().eval()
    inputs = example_inputs(model, (8, 8), batch=2)
    expected = model(**inputs)[0]
    convfusion.convert(model, uniform(Halo(block=4, window=8, cells=1, key_ratio=1, value_ratio=1)))
    convfusion.start_from_attention(model, [inputs])
    started = model(**inputs)[0]
    convfusion.revert(model)
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    untrained = model(**inputs)[0]
    assert (started - expected).norm() < 0.2 * (untrained - expected).norm()


def test_what_goes_by_captions_refuses_it(pipe, tmp_path):
    with pytest.raises(ConvFusionError, match="DDPMPipeline draws without captions"):
        build_cache(pipe, Prompts("list", ("red",)), tmp_path / "cache")
    with pytest.raises(ConvFusionError, match="takes no prompts"):
        generate(pipe, ["red"])
