"""Which blocks a name means: a path first, then those of the package, then the Hub's."""

import pytest
import torch

import convfusion
from convfusion import CheckpointError, mini
from convfusion.checkpoint import PACKAGED, find_blocks, hub
from convfusion.checkpoint.named import HubName
from convfusion.mixers import MeanOnly
from convfusion.surgery import mixers_of


def kinds(pipe):
    return {type(mixer.config).__name__ for mixer in mixers_of(pipe).values()}


def test_the_names_are_those_of_the_embedded_students():
    students = {name: student for name, student in mini.NAMES.items() if student is not None}
    assert {name: folder.name for name, folder in PACKAGED.items()} == students
    assert all((folder / "convfusion.json").is_file() for folder in PACKAGED.values())


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_blocks_load_by_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipe = mini.load_teacher()
    assert convfusion.load(pipe, name).converted == 7
    expected = mini.load_student(mini.NAMES[name]).unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipe.unet.state_dict().items())


def test_what_was_saved_under_a_packaged_name_is_what_loads_by_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipe = mini.load_teacher()
    convfusion.convert(pipe, convfusion.uniform(MeanOnly()))
    convfusion.save(pipe, "mini")
    for name in ("mini", "./mini", tmp_path / "mini"):
        loaded = mini.load_teacher()
        convfusion.load(loaded, name)
        assert kinds(loaded) == {"MeanOnly"}


def test_a_folder_that_hides_packaged_blocks_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    pipe = mini.load_teacher()
    with pytest.raises(CheckpointError, match="it hides the blocks of that name"):
        convfusion.load(pipe, "mini")
    assert convfusion.status(pipe).converted == 0


def test_a_name_on_the_hub_may_have_a_revision():
    assert find_blocks("me/blocks") == HubName("me/blocks")
    assert find_blocks("me/blocks", "v2") == HubName("me/blocks", "v2")
    assert find_blocks("me/blocks@refs/pr/1") == HubName("me/blocks", "refs/pr/1")
    assert find_blocks("me/blocks@v2", "v2") == HubName("me/blocks", "v2")
    assert str(HubName("me/blocks", "v2")) == "me/blocks@v2"


@pytest.mark.parametrize(
    ("source", "revision", "said"),
    [
        ("min", None, r"min is no folder here, .* that come with ConvFusion \(mini, mini-delta\)"),
        ("a/b/c", None, "a/b/c is no folder here"),
        ("here/x.safetensors", None, "x.safetensors cannot be read: there is no such file"),
        ("mini", "v2", "a revision is of a name on the Hub, user/name, not of mini"),
        ("me/blocks@v1", "v2", "give one revision, as user/name@revision"),
        ("me/blocks@", None, "give one revision"),
    ],
)
def test_a_name_that_cannot_be_is_refused_before_any_request(source, revision, said, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *args: pytest.fail("the Hub was asked"))
    with pytest.raises(CheckpointError, match=said):
        convfusion.load(mini.load_teacher(), source, revision=revision)


def test_the_revision_of_a_name_is_what_is_fetched(monkeypatch):
    asked = []

    def fetch(*args):
        asked.append(args)
        return PACKAGED["mini"]

    monkeypatch.setattr(hub, "fetch", fetch)
    pipe = mini.load_teacher()
    assert convfusion.load(pipe, "me/blocks@v2").converted == 7
    assert asked == [("me/blocks", ("blocks.safetensors", "convfusion.json"), "v2")]


def test_commands_take_the_names_and_refuse_others_before_the_model_loads(run, tmp_path):
    written = tmp_path / "apple.png"
    drawn = ("--prompt", "red apple, noto", "--steps", 2, "--out", written)
    code, _, err = run("generate", "mini-teacher", "--blocks", "mini-delta", *drawn)
    assert code == 0 and written.is_file(), err
    for command in (
        ["generate", "--prompt", "x"],
        ["convert", "--out", tmp_path / "new"],
        ["compare", "--prompt", "x"],
        ["evaluate", "--out", tmp_path / "evaluation"],
        ["export", "--out", tmp_path / "x.onnx"],
    ):
        words = (command[0], "no-such-model", "--blocks", "min", *command[1:])
        code, _, err = run(*words)
        assert code == 2 and "that come with ConvFusion (mini, mini-delta)" in err, err
