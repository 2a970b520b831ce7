"""Blocks by name: what is uploaded, what is fetched, and what is said where that cannot be."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import CheckpointError, checkpoint, cli
from convfusion.checkpoint import BLOCKS, MANIFEST, hub
from convfusion.checkpoint.card import describe_head
from convfusion.cli.models import open_pipeline
from convfusion.errors import ConvFusionError
from convfusion.surgery import mixers_of
from convfusion.surgery.record import TrainingRecord, set_record

pytestmark = pytest.mark.libraries

NAMED = {"base_model": "them/base", "license": "apache-2.0"}


class Api:
    """A Hub of one repository, in memory."""

    def __init__(self):
        self.files, self.calls = {}, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def create_commit(self, repo_id, operations, **options):
        self.calls.append(("create_commit", repo_id, options))
        for each in operations:
            with each.as_file() as file:
                self.files[each.path_in_repo] = file.read()
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def api(monkeypatch):
    found = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: found)
    return found


@pytest.fixture
def folder(tmp_path):
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    for mixer in mixers_of(pipe.unet).values():
        set_record(mixer, TrainingRecord("attention", 3))
    convfusion.save(pipe, tmp_path / "blocks")
    return tmp_path / "blocks"


def test_what_is_pushed_comes_back_by_name(folder, api, monkeypatch, tmp_path):
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "optimizer.safetensors").write_bytes(b"large")
    (folder / "losses.png").write_bytes(b"curve")
    (folder / "README.md").write_text('---\ntags: [x]\n---\nconvfusion.load(pipe, "this-folder")\n')
    url = checkpoint.push(
        folder, "me/blocks", private=True, revision="v2", message="second", **NAMED
    )
    assert url == "https://hub/commit/1"
    assert api.files.keys() == {BLOCKS, MANIFEST, "README.md", "losses.png"}
    assert api.files["README.md"].endswith(b'convfusion.load(pipe, "me/blocks")\n')
    assert api.calls == [
        ("create_repo", "me/blocks", {"private": True, "exist_ok": True}),
        ("create_branch", "me/blocks", {"branch": "v2", "exist_ok": True}),
        ("create_commit", "me/blocks", {"commit_message": "second", "revision": "v2"}),
    ]

    def snapshot(repo_id, *, revision, allow_patterns):
        assert (repo_id, revision, allow_patterns) == ("me/blocks", "v2", [BLOCKS, MANIFEST])
        for name in allow_patterns:
            (tmp_path / name).write_bytes(api.files[name])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    ours, fetched = stable_diffusion(), stable_diffusion()
    convfusion.load(ours, folder)
    convfusion.load(fetched, "me/blocks", revision="v2")
    state = fetched.unet.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.unet.state_dict().items())


def test_a_folder_without_a_card_gets_one(folder, api):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["base_model"] = "them/base"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    checkpoint.push(folder, "me/blocks", license="mit")
    card = huggingface_hub.ModelCard(api.files["README.md"].decode())
    assert card.data.base_model == "them/base" and card.data.library_name == "convfusion"
    assert "convfusion" in card.data.tags
    assert (
        'from_pretrained("them/base", use_safetensors=True)' in card.text
        and '"me/blocks"' in card.text
    )
    assert "7 × `delta_conv`: kernel_size 7" in card.text
    assert not (folder / "README.md").exists()


def test_only_whole_blocks_are_pushed(folder, api):
    (folder / BLOCKS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.push(folder, "me/blocks")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.push(folder / "nothing", "me/blocks")
    assert api.calls == []


def test_a_refusal_of_the_hub_is_one_clear_error(folder, api, monkeypatch):
    def refuse(*args, **options):
        raise OSError("401: log in\nand more")

    api.create_repo = refuse
    with pytest.raises(CheckpointError, match=r"me/blocks cannot be written to: 401: log in$"):
        checkpoint.push(folder, "me/blocks", **NAMED)


def test_a_hub_that_is_out_of_reach_or_asks_to_log_in_is_one_clear_error(folder, api):
    class NoConnection(Exception):  # as of an HTTP library, and no OSError
        response = None

    def fail(*args, **options):
        raise NoConnection("connection refused")

    api.create_commit = fail
    with pytest.raises(CheckpointError, match=r"cannot be written to: connection refused$"):
        checkpoint.push(folder, "me/blocks", **NAMED)
    NoConnection.response = SimpleNamespace(status_code=401)
    with pytest.raises(CheckpointError, match="log in with `hf auth login`"):
        checkpoint.push(folder, "me/blocks", **NAMED)


def test_a_name_that_is_nowhere_is_one_clear_error(folder, monkeypatch):
    pipe = stable_diffusion()
    with pytest.raises(CheckpointError, match="no/such is no folder here, and the Hub has no"):
        convfusion.load(pipe, "no/such")  # offline, as all tests are
    with pytest.raises(CheckpointError, match="a revision is of a name on the Hub"):
        convfusion.load(pipe, folder, revision="main")
    assert convfusion.status(pipe).converted == 0
    assert issubclass(RepositoryNotFoundError, hub.FAILURES)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of the Hub with two revisions of them/tiny, which differ in their scheduler."""
    root = tmp_path / "hub" / "models--them--tiny"
    (root / "refs").mkdir(parents=True)
    pipe = stable_diffusion()
    for name, commit, end in (("v1", "1" * 40, 0.01), ("main", "2" * 40, 0.02)):
        (root / "refs" / name).write_text(commit)
        pipe.scheduler.register_to_config(beta_end=end)
        pipe.save_pretrained(root / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "them/tiny"


def test_a_cached_name_loads_offline_at_its_revision(cached):
    assert open_pipeline(cached, "float32", "cpu").scheduler.config.beta_end == 0.02
    pipe = open_pipeline(cached, "float32", "cpu", revision="v1")
    assert pipe.scheduler.config.beta_end == 0.01
    convfusion.convert(pipe)
    with pytest.raises(ConvFusionError, match=r"them/tiny .*\(revision v9\)"):
        open_pipeline(cached, "float32", "cpu", revision="v9")


def test_a_revision_of_something_local_is_an_error(tmp_path):
    for model in ("mini", str(tmp_path)):
        with pytest.raises(ConvFusionError, match="--revision needs a name on the Hub"):
            open_pipeline(model, "float32", "cpu", revision="v1")


@pytest.mark.parametrize(
    "command", ["convert", "generate", "cache", "analyze", "ablate", "curve", "plan"]
)
def test_commands_pass_the_revision_on(command, cached, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("red\n")
    options = {
        "generate": ["--prompt", "x"],
        "analyze": ["--prompts", tmp_path / "prompts.txt"],
        "ablate": ["--prompts", tmp_path / "prompts.txt"],
        "cache": ["--data", tmp_path / "prompts.txt"],
        "curve": ["--data", tmp_path / "prompts.txt"],
        "plan": ["--size", "64x64"],
    }
    line = [command, cached, "--revision", "v9"]
    line += options.get(command, []) + ([] if command == "plan" else ["--out", tmp_path / "out"])
    monkeypatch.setattr("sys.argv", ["convfusion", *map(str, line)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "(revision v9)" in capsys.readouterr().err


def test_a_settings_file_may_name_a_revision(cached, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text(f'model = "{cached}"\nrevision = "v9"\n')
    line = ["distill", "--settings", str(tmp_path / "run.toml"), "--dry-run"]
    monkeypatch.setattr("sys.argv", ["convfusion", *line])
    with pytest.raises(SystemExit):
        cli.main()
    assert "(revision v9)" in capsys.readouterr().err


def test_a_card_of_a_run_and_of_a_folder_begin_alike():
    head = describe_head("them/base", "unet", "distillation")
    assert head.startswith("---\nbase_model: them/base\n")
    assert "base_model" not in describe_head("mini", "unet")
