"""The nodes for ComfyUI: blocks stand in for the self-attention of its UNets."""

import gc
import weakref

import comfyui_models as comfyui
import pytest
import torch
from comfyui_models import CONFIGS, call, call_twin, make_inputs, make_model, make_twin
from released_files import release
from safetensors.torch import save_file
from tiny_models import randomise

import convfusion
from convfusion import ConvFusionError, DeltaConv, Halo, uniform
from convfusion.errors import UnsupportedModelError
from convfusion.families import list_sites
from convfusion.surgery import mixers_of

comfyui.load_nodes()

from custom_nodes_convfusion import layout, nodes, patching  # noqa: E402

SIZES = ((8, 12), (16, 8))
MIXERS = {"halo": Halo(block=2, window=4, cells=2), "delta_conv": DeltaConv(kernel_size=3)}
WHOLE = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0, "keep_attention": ""}


@pytest.fixture(autouse=True)
def nothing_stays_loaded():
    yield
    comfyui.comfy.model_management.unload_all_models()


def skeleton_of(model):
    return layout.build_skeleton(model, layout.find_places(model))


def write_blocks(model, path, mixer=MIXERS["halo"]):
    """A file of blocks for a ComfyUI model, and the converted diffusers twin with them."""
    twin = make_twin(model, skeleton_of(model).config)
    convfusion.convert(twin, uniform(mixer))
    if isinstance(mixer, DeltaConv):  # of random halo blocks, softmax makes much of rounding
        randomise(mixers_of(twin))
    convfusion.save(twin, path)
    return twin


def apply(model, path, **options):
    return nodes.ApplyBlocks().apply(model, path, **{**WHOLE, **options})[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_skeleton_has_the_sites_of_the_model(name):
    model = make_model(name)
    places = layout.find_places(model)
    sites = list_sites(layout.build_skeleton(model, places))
    assert {site.path for site in sites} == places.keys()
    assert len(places) == {"sd15": 7, "sd21": 7, "sdxl": 18}[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_both_models_compute_the_same_before_and_with_blocks(name, tmp_path):
    model = make_model(name)
    plain = make_twin(model, skeleton_of(model).config)
    for kind, mixer in MIXERS.items():
        twin = write_blocks(model, tmp_path / f"{kind}.safetensors", mixer)
        patched = apply(model, tmp_path / f"{kind}.safetensors")
        for size in SIZES:
            inputs = make_inputs(*size)
            stock, changed = call(model, inputs), call(patched, inputs)
            torch.testing.assert_close(stock, call_twin(plain, inputs), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(changed, call_twin(twin, inputs), rtol=1e-5, atol=1e-5)
            assert (changed - stock).abs().max() > 1e-3


def test_every_site_is_patched_and_given_its_grid(tmp_path, monkeypatch):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    seen = []

    def note(mixer, tokens, grid):
        seen.append((tuple(grid), tokens.shape[1]))
        return tokens

    monkeypatch.setattr(patching, "run_block", note)
    patched = apply(model, tmp_path / "a.safetensors")
    for height, width in SIZES:
        seen.clear()
        call(patched, make_inputs(height, width))
        sides = [1, 2, 4, 2, 2, 1, 1]  # down, middle and up of the tiny SD1.5
        assert seen == [((height // s, width // s), height * width // s**2) for s in sides]


def test_unpatching_is_exact(tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    before = call(model, inputs)
    state = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
    patched = apply(model, tmp_path / "a.safetensors")
    assert not torch.equal(call(patched, inputs), before)
    assert torch.equal(call(model, inputs), before)
    after = model.model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())
    assert model.object_patches == {} and model.get_additional_models_with_key(patching.KEY) == []


def test_a_lora_on_other_layers_stays(tmp_path):
    model = make_model("sd15")
    twin = write_blocks(model, tmp_path / "a.safetensors")
    inner = "transformer_blocks.0.ff.net.2.weight"
    change = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    clone = model.clone()
    clone.add_patches({f"diffusion_model.input_blocks.1.1.{inner}": (change,)}, 0.5)
    patched = apply(clone, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    without = call_twin(twin, inputs)
    with torch.no_grad():
        twin.get_submodule("down_blocks.0.attentions.0").get_parameter(inner).add_(0.5 * change)
    expected = call_twin(twin, inputs)
    torch.testing.assert_close(call(patched, inputs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 1e-2


def test_blocks_stand_in_for_a_part_of_the_sampling(tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    stock, changed = call(model, inputs), call(apply(model, tmp_path / "a.safetensors"), inputs)
    part = apply(model, tmp_path / "a.safetensors", start_percent=0.25, end_percent=0.75)
    sampling = model.get_model_object("model_sampling")
    for percent, expected in ((0.1, stock), (0.3, changed), (0.7, changed), (0.9, stock)):
        sigma = float(sampling.percent_to_sigma(percent))
        assert torch.equal(call(part, inputs, sigma), expected), percent


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_a_part_that_is_none_is_refused(start, end, tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    with pytest.raises(ConvFusionError, match="lie between 0 and 1"):
        apply(model, tmp_path / "a.safetensors", start_percent=start, end_percent=end)


def test_few_tokens_keep_their_attention(tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    tall = apply(model, tmp_path / "a.safetensors", min_tokens=8 * 12 + 1)
    assert torch.equal(call(tall, inputs), call(model, inputs))
    first = apply(model, tmp_path / "a.safetensors", min_tokens=8 * 12)
    named = "down_blocks.1.*, mid, up 1 *"
    kept = apply(model, tmp_path / "a.safetensors", keep_attention=named)
    assert torch.equal(call(first, inputs), call(kept, inputs))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("down_blocks.7.*", "matches no site with a block; there are: down 0 0, down 1 0"),
        ("*", "nothing to apply"),
    ],
)
def test_patterns_of_no_use_are_refused(keep, message, tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    with pytest.raises(ConvFusionError, match=message):
        apply(model, tmp_path / "a.safetensors", keep_attention=keep)


def test_what_another_node_put_in_place_of_an_attention_is_kept(tmp_path):
    """Where the blocks do not stand in, it is called; of two files of blocks, each in its part."""
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    write_blocks(model, tmp_path / "b.safetensors", MIXERS["delta_conv"])
    inputs = make_inputs(8, 12)
    halo, delta = (call(apply(model, tmp_path / f"{n}.safetensors"), inputs) for n in "ab")
    late = apply(model, tmp_path / "a.safetensors", start_percent=0.5)
    both = apply(late, tmp_path / "b.safetensors", end_percent=0.5)
    sampling = model.get_model_object("model_sampling")
    early, lately = (float(sampling.percent_to_sigma(p)) for p in (0.2, 0.8))
    assert torch.equal(call(both, inputs, early), delta)
    assert torch.equal(call(both, inputs, lately), halo)
    assert len(both.get_additional_models_with_key(patching.KEY)) == 2
    assert torch.equal(call(model, inputs), call(model.clone(), inputs))


def test_tokens_in_another_order_are_refused(tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    patched = apply(model, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    same = patched.clone()
    same.set_model_attn1_patch(lambda n, context, value, options: (n, context, value))
    assert torch.equal(call(same, inputs), call(patched, inputs))
    for change in (
        lambda n, context, value, options: (n[:, ::2], n[:, ::2], n[:, ::2]),
        lambda n, context, value, options: (n, torch.cat([n, n], 1), torch.cat([n, n], 1)),
    ):
        other = patched.clone()
        other.set_model_attn1_patch(change)
        with pytest.raises(ConvFusionError, match="another node changes what"):
            call(other, inputs)


def test_a_released_file_is_applied(tmp_path):
    model = make_model("sd15")
    twin = make_twin(model, skeleton_of(model).config)
    path = tmp_path / "released.safetensors"
    save_file(release(twin), path)
    patched = apply(model, path)
    convfusion.load(twin, path)
    inputs = make_inputs(16, 8)
    torch.testing.assert_close(call(patched, inputs), call_twin(twin, inputs), rtol=1e-5, atol=1e-5)


def test_blocks_of_another_model_are_refused(tmp_path):
    write_blocks(make_model("sdxl"), tmp_path / "a.safetensors")
    model = make_model("sd15")
    with pytest.raises(ConvFusionError, match="a site that this model lacks"):
        apply(model, tmp_path / "a.safetensors")
    assert model.object_patches == {}


def test_another_kind_of_model_is_refused(tmp_path):
    model = make_model("sd15")
    model.model.model_config.unet_config = {"image_model": "flux"}
    with pytest.raises(UnsupportedModelError, match=r"know SD1\.x, SD2\.x and SDXL"):
        apply(model, tmp_path / "a.safetensors")


def test_nothing_is_kept_in_memory(tmp_path):
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    patched = apply(model, tmp_path / "a.safetensors")
    call(patched, inputs)
    store = patched.get_additional_models_with_key(patching.KEY)[0].model
    seen = [weakref.ref(block) for block in store.blocks]
    comfyui.comfy.model_management.unload_all_models()
    del patched, store
    gc.collect()
    assert [each() for each in seen] == [None] * 7


def test_blocks_that_were_left_elsewhere_are_brought_for_the_call(tmp_path):
    """As where ComfyUI had no room for them on the device, or computes in another dtype."""
    model = make_model("sd15")
    write_blocks(model, tmp_path / "a.safetensors")
    patched = apply(model, tmp_path / "a.safetensors")
    inputs = make_inputs(8, 12)
    expected = call(patched, inputs)
    for block in patched.get_additional_models_with_key(patching.KEY)[0].model.blocks:
        block.to(torch.float64)
    torch.testing.assert_close(call(patched, inputs), expected, rtol=1e-5, atol=1e-5)


def test_files_are_listed_and_found(tmp_path):
    comfyui.set_folder(tmp_path)
    (tmp_path / "mine").mkdir()
    write_blocks(make_model("sd15"), tmp_path / "mine" / "a.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    (names, _) = nodes.LoadBlocks.INPUT_TYPES()["required"]["name"]
    assert sorted(names) == ["damaged.safetensors", "mine/a.safetensors"]
    assert nodes.LoadBlocks().load("mine/a.safetensors") == (tmp_path / "mine" / "a.safetensors",)
    assert nodes.LoadBlocks.IS_CHANGED("mine/a.safetensors") > 0
    with pytest.raises(ConvFusionError, match="cannot be read"):
        nodes.LoadBlocks().load("damaged.safetensors")
