"""The bases that people use, at full size and without weights, and their single files."""

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from single_files import single_file
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import cli
from convfusion.checkpoint.loading import in_dtype
from convfusion.cli.models import open_pipeline
from convfusion.families import list_sites
from convfusion.surgery import presets

pytestmark = pytest.mark.libraries

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
DOWN, UP = "DownBlock2D", "UpBlock2D"

XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}
SDXL = {
    **XL,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **XL,
    "sample_size": 128,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
PIXART = {"caption_channels": 4096, "use_additional_conditions": False}
SD_LEVELS = {(0, 320): 5, (1, 640): 5, (2, 1280): 5, (3, 1280): 1}
XL_LEVELS = {(1, 640): 10, (2, 1280): 60}

# Class and config as published; preset; sites by (level, channels); millions of parameters: of the
# denoiser as published, of its self-attention, and of the blocks that the preset puts there.
BASES = {
    "SD1.5": (UNet2DConditionModel, {"cross_attention_dim": 768}, "sd15", SD_LEVELS,
              (859.5, 49.6, 25.4)),
    "SD1.5 inpainting": (UNet2DConditionModel, {"cross_attention_dim": 768, "in_channels": 9},
                         "sd15", SD_LEVELS, (859.5, 49.6, 25.4)),
    "SD2.1": (UNet2DConditionModel, SD21, "sd21", SD_LEVELS, (865.9, 49.6, 25.4)),
    "SDXL": (UNet2DConditionModel, SDXL, "sdxl", XL_LEVELS, (2567.5, 409.7, 211.3)),
    "SDXL turbo": (UNet2DConditionModel, {**SDXL, "sample_size": 64}, "sdxl", XL_LEVELS,
                   (2567.5, 409.7, 211.3)),
    "SDXL inpainting": (UNet2DConditionModel, {**SDXL, "in_channels": 9}, "sdxl", XL_LEVELS,
                        (2567.5, 409.7, 211.3)),
    "SDXL refiner": (UNet2DConditionModel, REFINER, "default",
                     {(1, 768): 20, (2, 1536): 20, (3, 1536): 4}, (2259.5, 273.7, 139.5)),
    "PixArt-α 512": (PixArtTransformer2DModel, {**PIXART, "sample_size": 64}, "pixart",
                     {(0, 1152): 28}, (610.9, 148.8, 79.8)),
    "PixArt-α 1024": (PixArtTransformer2DModel,
                      {"caption_channels": 4096, "use_additional_conditions": True,
                       "sample_size": 128}, "pixart", {(0, 1152): 28}, (611.3, 148.8, 79.8)),
    "PixArt-Σ 1024": (PixArtTransformer2DModel, {**PIXART, "sample_size": 128}, "pixart",
                      {(0, 1152): 28}, (610.9, 148.8, 79.8)),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_a_base_at_full_size(name):
    kind, config, preset, levels, published = BASES[name]
    with torch.device("meta"):
        model = kind(**config)
    assert presets.choose_preset(model) == preset
    found = {}
    for site in list_sites(model):
        place = (site.level, site.channels)
        found[place] = found.get(place, 0) + 1
    assert found == levels
    stock = sum(p.numel() for p in model.parameters())
    status = convfusion.convert(model)
    attention = sum(row.attention_parameters for row in status.sites)
    blocks = sum(row.mixer_parameters for row in status.sites)
    assert tuple(round(count / 1e6, 1) for count in (stock, attention, blocks)) == published
    convfusion.drop_attention(model)
    assert sum(p.numel() for p in model.parameters()) == stock - attention + blocks


def weights(row):
    """What a block of the default form weighs, counted by hand."""
    channels, inner, kernel = row.site.channels, row.site.channels // 2, row.mixer.kernel_size
    projections = channels * inner + inner + 2 * (inner // 2) * channels + channels
    return projections + 2 * kernel**2 * inner + channels * channels + channels


def test_sdxl_without_attention_holds_this_much_less():
    """−409 683 200 of attention, +211 265 920 of blocks: 2 567 463 684 → 2 369 046 404."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
    status = convfusion.convert(model)
    assert all(row.mixer_parameters == weights(row) for row in status.sites)
    assert sum(row.attention_parameters for row in status.sites) == 409_683_200
    assert sum(row.mixer_parameters for row in status.sites) == 211_265_920
    dropped = convfusion.drop_attention(model)
    assert sum(row.attention_parameters for row in dropped.sites) == 0
    assert sum(p.numel() for p in model.parameters()) == 2_369_046_404


# The first tensors of a single file in the layout of its makers, and the pipeline it is.
SINGLE = {
    "StableDiffusionPipeline": ["model.diffusion_model.input_blocks.0.0.weight"],
    "StableDiffusionXLPipeline": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.ln_final.bias",
    ],
    "StableDiffusionXLImg2ImgPipeline": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.0.model.ln_final.bias",
    ],
}


@pytest.fixture
def convert(monkeypatch, capsys, tmp_path):
    """Run `convfusion convert` on a model; its exit status and what it complained of."""

    def call(model):
        line = ["convfusion", "convert", str(model), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", line)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("kind", SINGLE)
def test_a_single_file_goes_to_its_pipeline(kind, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in SINGLE[kind]}, path)
    seen = []

    class Loaded:
        def __init__(self):
            self.components = {}

        def to(self, device):
            return self

    def from_single_file(file, **options):
        seen.append((file, options))
        return Loaded()

    monkeypatch.setattr(getattr(diffusers, kind), "from_single_file", from_single_file)
    assert isinstance(open_pipeline(str(path), "bfloat16", "cpu"), Loaded)
    assert seen == [(str(path), in_dtype(torch.bfloat16))]


def test_a_single_file_loads_with_the_configs_of_its_kind(tmp_path, monkeypatch):
    """diffusers finds them in the cache of the Hub, as it would on the Hub itself."""
    pipe, commit = stable_diffusion(), "1" * 40
    save_file(single_file(pipe), tmp_path / "model.safetensors")
    root = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    pipe.save_pretrained(root / "snapshots" / commit)
    for weights in root.rglob("*.safetensors"):
        weights.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = open_pipeline(str(tmp_path / "model.safetensors"), "float32", "cpu")
    for part in ("unet", "vae", "text_encoder"):
        expected, found = (getattr(each, part).state_dict() for each in (pipe, loaded))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert convfusion.convert(loaded).converted == 7


def test_a_single_file_without_configs_at_hand_is_one_clear_line(convert, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({SINGLE["StableDiffusionPipeline"][0]: torch.zeros(320, 4, 3, 3)}, path)
    code, said = convert(path)
    assert code == 2 and "a single file lacks configs and tokenisers" in said
    assert said.count("convfusion: ") == 1 and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_other_single_files_are_refused(convert, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, path)
    code, said = convert(path)
    assert code == 2 and "is no single file of SD1.x, SD2.x or SDXL" in said
    path.write_bytes(b"\x80\x04pickle")
    assert "cannot be read" in convert(path)[1]
    assert "cannot be read" in convert(tmp_path / "none.safetensors")[1]
