"""The contract of a model family: strict at registration, and one file is all it takes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from own_denoiser import PatchTransformer2DModel
from PIL import Image
from tiny_models import CASES
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion.bench.speed_plan import plan_speed
from convfusion.data import build_cache, open_source
from convfusion.distill import DistillConfig, distill
from convfusion.export import export_onnx
from convfusion.families import FAMILIES, Family, KeywordCarrier, family_of, list_sites, register
from convfusion.families.unet import UNet
from convfusion.generate import generate
from convfusion.surgery import presets

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = Path(convfusion.__file__).parent


@pytest.fixture
def forgotten():
    """What a test registers is forgotten after it."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_nothing_outside_of_families_asks_what_family_a_model_is_of():
    asks = re.compile(
        r"""isinstance\([^)]*(UNet2D|PixArt|DiT)"""
        r"""|family\w*(\([^)]*\))*(\.name)? *(==|!=|in) *["'(]"""
        r"""|["'](unet|pixart|dit)["']"""
    )
    found = [
        f"{path.relative_to(SOURCE)}:{number} {line.strip()}"
        for path in SOURCE.rglob("*.py")
        if "families" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line) and '"family": "unet"' not in line  # the example of a manifest
    ]
    assert not found


def test_every_family_has_a_tiny_model_in_the_table():
    assert {family_of(case.model()).name for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("lacking", ["name", "classes", "component", "latents", "presets"])
def test_a_family_that_lacks_something_is_refused(forgotten, lacking):
    half = type("Half", (UNet,), {"name": "half", "classes": ("Half",), "presets": {"half": {}}})
    full = type("Full", (half,), {"presets": {"half": {"*": 3}}, "full_size": {}, lacking: None})
    with pytest.raises(ValueError, match=f"must say its {lacking}"):
        register(full())
    assert "half" not in FAMILIES


def test_a_family_without_one_of_its_methods_cannot_be_made():
    class Half(Family):
        name, classes, component, latents = "half", ("Half",), "unet", "sample"

        def list_sites(self, model):
            return []

        def carrier(self, model):
            return KeywordCarrier(1, 0)

    with pytest.raises(TypeError, match=r"encode_prompts.*|example_conditioning"):
        Half()


@pytest.mark.parametrize(
    "taken", [{"classes": UNet.classes}, {"presets": UNet.presets}, {"name": "unet"}]
)
def test_what_another_family_has_is_refused(forgotten, taken):
    own = {"name": "own", "classes": ("Own",), "presets": {"own": {"*": 3}}, "full_size": {}}
    with pytest.raises(ValueError, match=r"unet"):
        register(type("Own", (UNet,), {**own, **taken})())
    assert "own" not in FAMILIES


@pytest.fixture
def own_pipeline(forgotten, tmp_path):
    """A pipeline of the denoiser in docs/extend.md, whose family is the file that stands there."""
    fences = re.findall(r"```python\n(.*?)```", (DOCS / "extend.md").read_text("utf-8"), re.S)
    (text,) = [fence for fence in fences if "class PatchTransformer(Family)" in fence]
    file = tmp_path / "patch_transformer.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("patch_transformer", file)
    sys.modules["patch_transformer"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    pipe = stable_diffusion()
    pipe.register_modules(unet=PatchTransformer2DModel().eval())
    yield pipe
    del sys.modules["patch_transformer"]


def test_the_family_in_the_docs_does_everything(own_pipeline, tmp_path):
    pipe, pictures = own_pipeline, tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 20, 90)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("red apple", encoding="utf-8")
    assert presets.choose_preset(pipe.unet) == "patch_transformer"
    before = generate(pipe, ["green"], steps=2)[0].tobytes()
    assert convfusion.convert(pipe).converted == 2
    cache = build_cache(pipe, open_source(str(pictures)), tmp_path / "cache")
    result = distill(pipe, cache, DistillConfig(steps=1, batch_size=2, tracker="none"))
    assert result.steps == 1
    drawn = generate(pipe, ["green"], steps=2, size=(24, 16))[0]
    assert drawn.size == (16, 24)
    assert export_onnx(pipe, tmp_path / "own.onnx").inputs[0] == "sample"
    config = presets.get_preset("patch_transformer")
    convfusion.save(pipe, tmp_path / "blocks")
    convfusion.revert(pipe)
    assert generate(pipe, ["green"], steps=2)[0].tobytes() == before
    plan = plan_speed(pipe, config, (8, 8))
    assert plan is not None
    convfusion.load(pipe, tmp_path / "blocks")
    assert len(list_sites(pipe.unet)) == 2
    assert convfusion.status(pipe).family == "patch_transformer"


def test_a_class_that_hands_no_keywords_down_needs_a_carrier_of_its_own():
    with pytest.raises(convfusion.ConvFusionError, match="HunyuanDiT2DModel takes no cross_att"):
        KeywordCarrier.of(HunyuanDiT2DModel, patch=2)


def test_the_page_lists_the_whole_contract():
    page = (DOCS / "extend.md").read_text(encoding="utf-8")
    table = page.split("## A model family")[1].split("A `Site` is")[0]
    listed = {name for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", table) if hasattr(Family, name)}
    stated = set(Family.__annotations__) | {n for n in vars(Family) if n[0] != "_"}
    assert stated - {"name", "classes", "component", "latents", "presets"} <= listed
