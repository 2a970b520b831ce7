"""CLIP scores: what CLIP models and their kin see in texts, each by itself."""

import json
from pathlib import Path

import pytest
import torch
from evaluations import make_settings, student, thumbnails
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

from convfusion import ConvFusionError, mini
from convfusion.evaluate import evaluate, open_clip, open_extractor

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
VISION = SMALL | {"image_size": 28, "patch_size": 14}
PROMPTS = ["red", "a much longer text about a red apple on a table", "a word " * 200, "red"]


def words():
    return CLIPTokenizer.from_pretrained(mini.TEACHER / "tokenizer")


def clip_folder(folder, **text):
    told = words()
    told.save_pretrained(folder)
    text = {"vocab_size": len(told), "max_position_embeddings": told.model_max_length} | text
    text |= {"bos_token_id": told.bos_token_id, "eos_token_id": told.eos_token_id}
    config = CLIPConfig(text_config=SMALL | text, vision_config=VISION, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).eval().save_pretrained(folder)
    return str(folder)


def siglip_folder(folder):
    told = words()
    told.save_pretrained(folder)
    text = {"vocab_size": len(told), "max_position_embeddings": 12, "projection_size": 16}
    torch.manual_seed(0)
    config = SiglipConfig(text_config=SMALL | text, vision_config=VISION)
    SiglipModel(config).eval().save_pretrained(folder)
    return str(folder)


def change(folder, **values):
    """Overrule what a tokenizer says of itself; None takes a value away."""
    path = Path(folder) / "tokenizer_config.json"
    told = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: each for name, each in told.items() if each is not None}))


def noise(seed):
    pixels = torch.randint(0, 256, (40, 30, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


@pytest.mark.parametrize("made", [clip_folder, siglip_folder])
def test_scores_are_what_the_model_itself_says(made, tmp_path):
    """logits_per_image is the cosine, times the model's own temperature, and its bias."""
    clip = open_clip(made(tmp_path))
    pictures = [noise(i) for i in range(2)]
    embedded = clip.images(pictures).features, clip.embed_texts(PROMPTS)
    padding = "max_length" if made is siglip_folder else True
    longest = 12 if made is siglip_folder else None
    tokens = clip.tokenizer(
        PROMPTS, padding=padding, truncation=True, max_length=longest, return_tensors="pt"
    )
    if made is siglip_folder:
        del tokens["attention_mask"]
    with torch.no_grad():
        told = clip.model(pixel_values=clip.images.preprocessing(pictures), **tokens)
    cosines = torch.cosine_similarity(embedded[0][:, None], embedded[1][None], dim=2)
    expected = told.logits_per_image - getattr(clip.model, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(
        cosines, expected / clip.model.logit_scale.exp(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("made", [clip_folder, siglip_folder])
def test_a_text_does_not_depend_on_those_beside_it(made, tmp_path):
    clip = open_clip(made(tmp_path))
    together = clip.embed_texts(PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert torch.equal(clip.embed_texts([prompt])[0], found)


def test_a_clip_model_is_an_extractor_too(tmp_path):
    assert open_extractor(clip_folder(tmp_path)).preprocessing.side == 28
    assert open_extractor(str(tmp_path))([noise(0)]).features.shape == (1, 8)


def test_siglip_looks_with_its_own_means(tmp_path):
    assert open_extractor(siglip_folder(tmp_path)).preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [
    {"model_max_length": None}, {"model_max_length": 10**30}, {"model_max_length": 5000},
    {"pad_token": None, "model_max_length": None},
])  # fmt: skip
def test_texts_are_cut_whatever_the_tokenizer_says(values, tmp_path):
    folder = clip_folder(tmp_path)
    expected = open_clip(folder).embed_texts(PROMPTS)
    change(folder, **values)
    assert torch.equal(open_clip(folder).embed_texts(PROMPTS), expected)


def no_padding(folder):
    siglip_folder(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))


def more_words(folder):
    clip_folder(folder, vocab_size=5)


def fewer_positions(folder):
    """Positions that the config promises and the weights have not."""
    from safetensors.torch import load_file, save_file

    clip_folder(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "text_model.embeddings.position_embedding.weight"
    tensors[name] = tensors[name][:4].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


UNFIT = {
    no_padding: "names no padding token",
    more_words: "tokens that it does not know",
    fewer_positions: "is no extractor",
}


@pytest.mark.parametrize("made", UNFIT, ids=lambda made: made.__name__)
def test_a_text_side_that_would_fail_is_refused_at_once(made, tmp_path):
    made(tmp_path)
    with pytest.raises(ConvFusionError, match=UNFIT[made]) as told:
        open_clip(str(tmp_path))
    assert "\n" not in str(told.value)


def test_texts_are_read_before_anything_is_drawn(tmp_path, monkeypatch):
    clip = open_clip(clip_folder(tmp_path / "clip"))
    monkeypatch.setattr(clip.model.config.text_config, "vocab_size", 5)
    with pytest.raises(ConvFusionError, match="'red apple' has tokens that it does not know"):
        evaluate(student(), make_settings(), tmp_path / "out", extractor=thumbnails(), clip=clip)
    assert not (tmp_path / "out").exists()
