"""Models that other libraries have patched: each is converted in effect, or refused by name."""

import copy
import types
import warnings

import diffusers
import pytest
import tomesd
import torch
from accelerate import dispatch_model
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import nn

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, mini
from convfusion.surgery import attention_back, attention_teacher, mixers_of

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"


def run(unet, scale=1.0):
    g = torch.Generator().manual_seed(0)
    sample = scale * torch.randn(1, 4, 16, 16, generator=g)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=g)
    with torch.no_grad():
        return unet(sample, 500, text).sample


@pytest.fixture(scope="module")
def stock():
    return run(mini.load_teacher().unet)


@pytest.fixture(scope="module")
def student():
    return run(mini.load_student().unet)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def by_accelerate(unet):
    dispatch_model(unet, {"": "cpu"}, force_hooks=True)


def by_diffusers(unet):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 900
    )
    apply_pyramid_attention_broadcast(unet, config)


def by_hand(unet, kind=Attention):
    for module in unet.modules():
        if isinstance(module, kind):
            module.forward = (lambda own: lambda *a, **k: own(*a, **k))(module.forward)


def by_hand_on_blocks(unet):
    by_hand(unet, BasicTransformerBlock)


def by_hand_on_owners(unet):
    by_hand(unet, diffusers.Transformer2DModel)


def by_hand_on_the_model(unet):
    by_hand(unet, diffusers.UNet2DConditionModel)


def prompt_to_prompt(unet):
    def own(self):
        def forward(hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = self.to_q(hidden_states), self.to_k(text), self.to_v(text)
            query, key, value = map(self.head_to_batch_dim, (query, key, value))
            scores = self.get_attention_scores(query, key)
            return self.to_out[0](self.batch_to_head_dim(scores @ value))

        return forward

    for module in unet.modules():
        if isinstance(module, Attention):
            module.forward = own(module)


PATCHES = [
    by_accelerate,
    by_diffusers,
    by_hand,
    by_hand_on_blocks,
    by_hand_on_owners,
    by_hand_on_the_model,
]
table = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)


@table
def test_a_wrapped_forward_comes_to_the_block_and_back(patch, stock, student):
    pipe = mini.load_teacher()
    patch(pipe.unet)
    convfusion.load(pipe, mini.STUDENTS / "near")
    close(run(pipe.unet), student)
    convfusion.revert(pipe)
    close(run(pipe.unet), stock)


@table
def test_a_forward_wrapped_later_follows_every_way_back(patch, stock, student):
    pipe = mini.load_student()
    patch(pipe.unet)
    close(run(pipe.unet), student)
    close(run(attention_teacher(pipe.unet)), stock)
    with attention_back(pipe, mixers_of(pipe)):
        close(run(pipe.unet), stock)
    close(run(pipe.unet), student)
    convfusion.revert(pipe)
    close(run(pipe.unet), stock)


def test_a_forward_that_computes_the_attention_itself_is_refused():
    pipe = mini.load_teacher()
    prompt_to_prompt(pipe.unet)
    with pytest.raises(ConvFusionError, match=r"attn1 has a `forward` of its own.*take that patch"):
        convfusion.convert(pipe)
    assert convfusion.status(pipe).converted == 0
    pipe = mini.load_student()
    prompt_to_prompt(pipe.unet)
    with pytest.raises(ConvFusionError, match="computes the attention by itself"):
        run(pipe.unet)


def test_a_copy_whose_patches_call_the_original_is_refused():
    unet = mini.load_student().unet
    by_hand(unet)
    with pytest.raises(ConvFusionError, match="has a `forward` of its own"):
        run(copy.deepcopy(unet))


def test_further_tokens_to_attend_to_are_refused():
    unet = mini.load_student().unet
    block = unet.get_submodule(MIDDLE.removesuffix(".attn1"))

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **given):
        tokens, extra = self.norm1(hidden_states), given["cross_attention_kwargs"]
        others = torch.cat([tokens, tokens], 1)
        return hidden_states + self.attn1(tokens, encoder_hidden_states=others, **extra)

    block.forward = types.MethodType(forward, block)
    with pytest.raises(ConvFusionError, match=rf"{MIDDLE} was given further tokens"):
        run(unet)


@torch.no_grad()
def test_its_own_tokens_may_be_given_again_and_others_or_longer_ones_not():
    attention = mini.load_student().unet.get_submodule(MIDDLE)
    tokens, grid = torch.randn(1, 16, attention.query_dim), torch.empty(4, 4, 0)
    expected = attention(tokens, grid=grid)
    assert torch.equal(attention(tokens, tokens, grid=grid), expected)
    assert torch.equal(attention(tokens, tokens.clone(), grid=grid), expected)
    with pytest.raises(ConvFusionError, match="further tokens"):
        attention(tokens, tokens + 1, grid=grid)
    with pytest.raises(ConvFusionError, match=r"N = 32 tokens, but the grid 4×4 has 16"):
        attention(torch.cat([tokens, tokens], 1), grid=grid)


def test_merged_tokens_are_refused_and_work_once_the_patch_is_off(student):
    unet = mini.load_student().unet
    tomesd.apply_patch(unet, ratio=0.5, max_downsample=8)
    with pytest.raises(ConvFusionError, match=r"N = 128 tokens.*tomesd"):
        run(unet)
    tomesd.remove_patch(unet)
    close(run(unet), student)


def draw(kind, pipe, call=None, **options):
    names = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = kind(**names, requires_safety_checker=False, **options)
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    return made("snail, noto", generator=generator, **settings, **(call or {})).images


def test_perturbed_attention_is_refused_where_converted_and_works_elsewhere():
    def perturbed(pipe, scale):
        kind = diffusers.StableDiffusionPAGPipeline
        return draw(kind, pipe, {"pag_scale": scale}, pag_applied_layers="mid")

    pipe = mini.load_student()
    plain = draw(diffusers.StableDiffusionPipeline, pipe)
    with pytest.raises(ConvFusionError, match=rf"\(PAG\).*{MIDDLE} is converted"):
        perturbed(pipe, 3.0)
    assert torch.equal(draw(diffusers.StableDiffusionPipeline, pipe), plain)
    with attention_back(pipe, [MIDDLE]):
        assert not torch.allclose(perturbed(pipe, 3.0), perturbed(pipe, 0.0), atol=1e-3)
    pipe = mini.load_teacher()
    pipe.unet.get_submodule(MIDDLE).processor = PAGIdentitySelfAttnProcessor2_0()
    with pytest.raises(ConvFusionError, match="PAG"):
        convfusion.convert(pipe)


def test_smoothed_energy_guidance_is_refused():
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    unet = mini.load_student().unet
    blocks = SmoothedEnergyGuidanceConfig([0], fqn="mid_block.attentions.0.transformer_blocks")
    _apply_smoothed_energy_guidance_hook(unet, blocks, 1.0)
    with pytest.raises(ConvFusionError, match=f"perturbs the self-attention, and {MIDDLE}"):
        run(unet)


@pytest.mark.filterwarnings("ignore")
def test_self_attention_guidance_sees_the_attention_that_waits():
    kind, call = diffusers.StableDiffusionSAGPipeline, {"sag_scale": 0.75}
    pipe = mini.load_student()
    assert not torch.allclose(draw(kind, pipe, call), draw(kind, pipe, {"sag_scale": 0.0}))
    convfusion.drop_attention(pipe)
    with pytest.raises(ConvFusionError, match="weights were dropped"):
        draw(kind, pipe, call)


@pytest.mark.filterwarnings("ignore")
def test_attend_and_excite_works_since_it_wants_the_cross_attention():
    kind = diffusers.StableDiffusionAttendAndExcitePipeline
    call = {"token_indices": [1], "attn_res": (8, 8), "max_iter_to_alter": 1}
    pipe = mini.load_student()
    altered = draw(kind, pipe, call | {"thresholds": {0: 0.1}})
    assert not torch.allclose(altered, draw(diffusers.StableDiffusionPipeline, pipe), atol=1e-3)


class Recorder:
    """A processor of a user's: it counts, and returns something else."""

    def __init__(self):
        self.calls = {"self": 0, "cross": 0}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.calls["self" if encoder_hidden_states is None else "cross"] += 1
        found = AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return found if encoder_hidden_states is not None else 2 * found


def test_another_processor_is_called_and_told_once(student):
    unet, recorder = mini.load_student().unet, Recorder()
    unet.set_attn_processor(recorder)
    with pytest.warns(UserWarning, match=f"Recorder is called on 7 converted self-att.*{MIDDLE}"):
        close(run(unet), student)
    assert recorder.calls == {"self": 7, "cross": 7}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(unet)
    assert set(unet.attn_processors.values()) == {recorder}
    unet.set_attn_processor(AttnProcessor2_0())
    unet.set_default_attn_processor()
    close(run(unet), student)


def test_processors_that_are_modules_come_and_go(stock, student):
    class Trained(nn.Module):
        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)

    unet = mini.load_student().unet
    unet.set_attn_processor({name: Trained() for name in unet.attn_processors})
    with pytest.warns(UserWarning, match="Trained"):
        close(run(unet), student)
    unet.set_attn_processor(AttnProcessor2_0())
    assert type(unet.get_submodule(MIDDLE).get_processor()) is AttnProcessor2_0
    unet.set_attn_processor({name: Trained() for name in unet.attn_processors})
    convfusion.revert(unet)
    assert type(unet.get_submodule(MIDDLE).processor) is Trained
    close(run(unet), stock)


def like(attention):
    return Attention(
        query_dim=attention.query_dim,
        cross_attention_dim=attention.cross_attention_dim if attention.is_cross_attention else None,
        heads=attention.heads,
        dim_head=attention.inner_dim // attention.heads,
    )


def hooked(unet):
    return [module for module in unet.modules() if module._forward_pre_hooks]


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("place", ["attn1", "attn2", "wrapped", "every attn1", "no attention"])
def test_revert_restores_what_is_ours_and_leaves_the_rest(place):
    unet = mini.load_student().unet
    block = unet.get_submodule(MIDDLE.removesuffix(".attn1"))
    if place in ("attn1", "attn2"):
        setattr(block, place, like(getattr(block, place)))
    elif place == "wrapped":
        block.attn1 = Wrapper(block.attn1)
    else:
        for each in [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]:
            each.attn1 = like(each.attn1) if place == "every attn1" else nn.Identity()
    others = block.attn1, block.attn2
    convfusion.revert(unet)
    assert (block.attn1, block.attn2) == others
    assert not mixers_of(unet)
    assert not hooked(unet)
    assert not any("mixer" in name for name, _ in unet.named_modules())
    if place != "no attention":
        run(unet)
        convfusion.convert(unet)
        convfusion.revert(unet)
        assert torch.equal(run(unet), run(copy.deepcopy(unet)))
    with pytest.raises(ConvFusionError, match="nothing to revert"):
        convfusion.revert(unet)


def test_a_model_whose_sites_were_all_replaced_can_be_converted_again():
    unet = mini.load_student().unet
    for block in [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]:
        block.attn1 = like(block.attn1)
    convfusion.convert(unet)
    run(unet)
    convfusion.revert(unet)
    assert not hooked(unet)
    run(unet)


def test_revert_while_the_attention_stands_in(stock):
    unet = mini.load_student().unet
    with attention_back(unet, list(mixers_of(unet))[:3]):
        with pytest.raises(ConvFusionError, match="converted already"):
            convfusion.convert(unet)
        convfusion.revert(unet)
    assert convfusion.status(unet).converted == 0
    assert not hooked(unet)
    close(run(unet), stock)


def test_a_motion_module_keeps_its_attention_over_time():
    unet = mini.load_teacher().unet
    channels = unet.mid_block.attentions[0].in_channels
    motion = TransformerTemporalModel(1, 8, in_channels=channels, norm_num_groups=8)
    unet.mid_block.motion_modules = nn.ModuleList([motion])
    status = convfusion.convert(unet, ConvertConfig(sites={"*": DeltaConv()}))
    assert status.converted == len(status.sites) == 7
