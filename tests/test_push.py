"""What `push` checks before anything is sent, and what it says where that fails."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import CheckpointError, uniform
from convfusion.checkpoint import BLOCKS, MANIFEST, hub
from convfusion.checkpoint.publish import prepare
from convfusion.files import read_tensors, write_csv, write_tensors
from convfusion.fingerprint import tensors_fingerprint
from convfusion.mixers import Removed
from convfusion.surgery import mixers_of
from convfusion.surgery.record import TrainingRecord, set_record

NAMED = {"base_model": "them/base", "license": "apache-2.0"}
ROW = {"metric": "psnr", "pictures": "student", "reference": "teacher", "value": 28.04}
FIGURES = [
    ROW | {"standard_error": 0.91},
    ROW | {"pictures": "teacher-other-seed", "value": 10.0, "standard_error": 0.3},
    ROW | {"metric": "epsilon_error", "value": 2.27e-3, "standard_error": ""},
    ROW | {"metric": "ssim", "value": "nan", "standard_error": ""},
    ROW
    | {"metric": "excess_kernel_distance", "reference": "teacher-other-seed"}
    | {"value": -0.0012, "standard_error": 0.0034},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Blocks as of a run, and a Hub that fails a test which sends anything."""
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("something was sent"))
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    for mixer in mixers_of(pipe.unet).values():
        set_record(mixer, TrainingRecord("attention", 3))
    convfusion.save(pipe, tmp_path / "blocks")
    return tmp_path / "blocks"


def change(folder, **entries):
    """Other entries in the manifest; None takes one out."""
    manifest = json.loads((folder / MANIFEST).read_text()) | entries
    kept = {key: value for key, value in manifest.items() if value is not None}
    (folder / MANIFEST).write_text(json.dumps(kept))


def change_tensors(folder, alter):
    tensors = read_tensors(folder / BLOCKS)
    alter(tensors)
    change(folder, sha256=write_tensors(folder / BLOCKS, tensors))


def forget_a_setting(folder):
    sites = json.loads((folder / MANIFEST).read_text())["sites"]
    next(iter(sites.values()))["mixer"].pop("kernel_size")
    change(folder, sites=sites)


def evaluate(folder, place, **changes):
    """What `convfusion evaluate` writes, as far as a card needs it."""
    place.mkdir()
    blocks = {name: tensor.half() for name, tensor in read_tensors(folder / BLOCKS).items()}
    record = {
        "version": "0.1.0",
        "settings": {"samples": 64, "prompts": 32, "steps": 25, "guidance": 3.0, "size": [64, 96]},
        "model": {"precision": "float16", "weights": {"blocks": tensors_fingerprint(blocks)}},
        "extractor": {"name": "a network"},
    }
    (place / "evaluation.json").write_text(json.dumps(record | changes))
    write_csv(place / "evaluation.csv", list(FIGURES[0]), FIGURES)


REFUSALS = {
    "no family": (lambda f: change(f, family="cascade"), {}, "names no family of models"),
    "a setting is missing": (forget_a_setting, {}, "does not say all settings of down_blocks"),
    "a tensor is missing": (
        lambda f: change_tensors(f, lambda tensors: tensors.popitem()),
        {},
        "is not what convfusion.json describes",
    ),
    "not finite": (
        lambda f: change_tensors(f, lambda t: next(iter(t.values())).fill_(float("nan"))),
        {},
        "NaN or infinite values",
    ),
    "no origin": (
        lambda f: change(f, trained=None, started_from=None),
        {},
        "does not say how these blocks were made",
    ),
    "not trained": (
        lambda f: change(f, trained=False, started_from="converted"),
        {},
        "as `convert` made them, and draw noise",
    ),
    "no base": (None, {"base_model": None}, "does not say which model on the Hub"),
    "a base on disk": (None, {"base_model": "here"}, r"\(here does not look like user/name\)"),
    "a base that was loaded from a folder": (
        lambda f: change(f, base_model="teacher"),
        {"base_model": None},
        "on the Hub these blocks are for: name it as base_model",
    ),
    "no licence": (None, {"license": None}, "does not say under which licence"),
    "no such licence": (
        None,
        {"license": "Apache 2"},
        r"Apache 2 is no licence that the Hub knows \(apache-2.0\?\)",
    ),
    "a licence in nonsense": (None, {"license": "nonsense"}, "nonsense is no licence that the Hub"),
    "a licence of one's own": (None, {"license": "other"}, "license_name and license_link"),
    "no evaluation": (None, {"evaluation": "nowhere"}, "nowhere/evaluation.json cannot be read"),
    "a damaged card": (
        lambda f: (f / "README.md").write_text("---\nlicense: [\n---\n"),
        {},
        "README.md has a damaged head",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_fit_to_publish_is_refused_before_anything_is_sent(folder, case):
    spoil, options, said = REFUSALS[case]
    if spoil is not None:
        spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        convfusion.checkpoint.push(folder, "me/blocks", **{**NAMED, **options})


def test_a_name_that_the_hub_cannot_have_is_refused(folder):
    with pytest.raises(CheckpointError, match="looks like user/name, not like blocks"):
        prepare(folder, "blocks", **NAMED)


def test_blocks_without_values_can_be_published(tmp_path):
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(Removed()))
    convfusion.save(pipe, tmp_path / "blocks")
    assert "- 7 × `removed`" in prepare(tmp_path / "blocks", "me/nothing", **NAMED).card


def test_the_figures_of_an_evaluation_stand_in_the_card(folder):
    assert "Not measured." in prepare(folder, "me/blocks", **NAMED).card
    evaluate(folder, folder / "evaluation")
    ready = prepare(folder, "me/blocks", **NAMED)
    assert "| PSNR in dB, higher is closer | 28.0 ± 0.9 | 10.0 ± 0.3 |" in ready.card
    assert "| ε-error, 0 is equal | 2.3e-03 | – |" in ready.card
    assert "| SSIM, 1 is equal | – | – |" in ready.card
    assert "over 64 pictures of 32 prompts, 96×64 pixels" in ready.card
    assert "exceeds that of its own by −1.20 ± 3.40 thousandths (a network)" in ready.card
    assert "Not measured." not in ready.card
    assert ready.files["evaluation/evaluation.csv"].is_file()


def test_an_evaluation_of_other_blocks_is_refused(folder, tmp_path):
    evaluate(folder, tmp_path / "seen")
    change_tensors(folder, lambda tensors: next(iter(tensors.values())).mul_(2))
    with pytest.raises(CheckpointError, match="is not of the blocks in"):
        prepare(folder, "me/blocks", evaluation=tmp_path / "seen", **NAMED)
    shutil.rmtree(tmp_path / "seen")
    evaluate(folder, tmp_path / "seen", settings={})
    with pytest.raises(CheckpointError, match="is no finished evaluation"):
        prepare(folder, "me/blocks", evaluation=tmp_path / "seen", **NAMED)


def test_a_card_of_ones_own_keeps_its_words_and_names_what_it_says(folder):
    head = "license: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: them/base"
    own = f"---\n{head}\ntags: [x]\n---\n# Mine\n\nAs I like it.\n"
    (folder / "README.md").write_text(own)
    ready = prepare(folder, "me/blocks")
    card = huggingface_hub.ModelCard(ready.card)
    assert card.text.strip() == "# Mine\n\nAs I like it."
    told = card.data.to_dict()
    assert (told["license"], told["license_name"], told["tags"]) == ("other", "mine", ["x"])
    assert (ready.base_model, told["library_name"]) == ("them/base", "convfusion")
    assert prepare(folder, "me/blocks", license="mit").card.count("license: mit") == 1
    (folder / "README.md").write_text("# Mine\n")
    bare = huggingface_hub.ModelCard(prepare(folder, "me/blocks", **NAMED).card)
    assert bare.text.strip() == "# Mine" and bare.data.license == "apache-2.0"


def test_a_card_says_the_name_that_the_base_has_on_the_hub(folder):
    change(folder, base_model="my-copy")
    run = prepare(folder, "me/blocks", **NAMED).card
    assert 'from_pretrained("them/base", use_safetensors=True)' in run and "my-copy" not in run
    assert "convfusion generate them/base --blocks me/blocks --prompt" in run


def test_the_command_shows_the_card_and_sends_nothing(folder, run):
    words = ("--base-model", "them/base", "--license", "mit", "--dry-run")
    code, out, err = run("push", folder, "me/blocks", *words)
    assert code == 0, err
    assert 'convfusion.load(pipe, "me/blocks")' in out and "blocks.safetensors (" in out
    code, _, err = run("push", folder, "me/blocks", "--license", "mit")
    assert code == 2 and "(--base-model user/name)" in err


def test_values_are_compared_in_the_precision_of_the_evaluation(folder, tmp_path):
    """As a student that was loaded in half precision holds them."""
    evaluate(folder, tmp_path / "seen")
    pipe = stable_diffusion().to(torch.float16)
    convfusion.load(pipe, folder)
    state = {k: v for k, v in pipe.unet.state_dict().items() if ".mixer." in k}
    record = json.loads((tmp_path / "seen" / "evaluation.json").read_text())
    assert record["model"]["weights"]["blocks"] == tensors_fingerprint(state)
