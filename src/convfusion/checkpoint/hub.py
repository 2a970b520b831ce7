"""The Hugging Face Hub: blocks uploaded with a model card, blocks and pipelines fetched by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from convfusion.checkpoint.loading import check_index
from convfusion.errors import CheckpointError, ConvFusionError, first_line
from convfusion.text import markdown_code, markdown_text, python_string

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a repository, owner/name

CARD = "README.md"
BESIDE = ("losses.png", "validation/*.png")  # what a card may show
HERE = '"this-folder"'  # how a card calls the blocks that it lies beside

FAILURES = (OSError, HfHubHTTPError, HFValidationError)


def upload(
    folder: Path,
    files: tuple[str, ...],
    repo_id: str,
    *,
    card: str,
    private: bool,
    revision: str | None,
    message: str,
) -> str:
    """Put some files of a folder into a repository, made if need be, in one commit; its address.

    Args:
        folder: on disk.
        files: names within it; pictures that a card may show go along.
        repo_id: `user/name`.
        card: text of the card, whose `HERE` becomes the repository's name.
        private: of a repository that is new.
        revision: branch to write to, by default the main one.
        message: of the commit.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached.
    """
    pictures = sorted(path for pattern in BESIDE for path in folder.glob(pattern))
    names = [*files, *(path.relative_to(folder).as_posix() for path in pictures)]
    text = card.replace(HERE, f'"{repo_id}"').encode()
    operations = [CommitOperationAdd(CARD, text)]
    operations += [CommitOperationAdd(name, folder / name) for name in names]
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except FAILURES as error:
        raise CheckpointError(f"{repo_id} cannot be written to: {first_line(error)}") from None
    return done.commit_url


def fetch(repo_id: str, files: tuple[str, ...], revision: str | None) -> Path:
    """The folder of the cache with some files of a repository, fetched unless the Hub is off.

    Raises:
        CheckpointError: there is no such repository, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except FAILURES as error:
        raise CheckpointError(
            f"{repo_id} is no folder here, and the Hub has no repository of that name and "
            f"revision or cannot be reached ({first_line(error)})"
        ) from None


def fetch_pipeline(repo_id: str, revision: str | None) -> Path:
    """The folder of the cache with a pipeline of diffusers, of its safetensors weights alone.

    Its `model_index.json` comes first, so that a model that cannot be converted is refused before
    its weights are fetched. Where there are no plain weights, those of the variant fp16 are taken.

    Raises:
        CheckpointError: there is no such pipeline, or the Hub cannot be reached.
        UnsupportedModelError: its denoiser is of a class that cannot be converted.
    """
    from diffusers import DiffusionPipeline

    wanted = f" (revision {revision})" if revision else ""
    if not NAME.fullmatch(repo_id):
        raise CheckpointError(
            f"{repo_id} is no pipeline: there is no such folder or file here, and names on the Hub "
            "look like user/name"
        )
    try:
        check_index(DiffusionPipeline.load_config(repo_id, revision=revision), repo_id)
        options = {"revision": revision, "use_safetensors": True}
        try:
            return Path(DiffusionPipeline.download(repo_id, **options))
        except (*FAILURES, ValueError) as error:
            try:
                return Path(DiffusionPipeline.download(repo_id, variant="fp16", **options))
            except (*FAILURES, ValueError):
                raise error from None
    except ConvFusionError:
        raise
    except (*FAILURES, ValueError) as error:
        raise CheckpointError(
            f"{repo_id} is no pipeline: no folder of that name is here, and the Hub has none of "
            f"that name{wanted} or cannot be reached ({first_line(error)})"
        ) from None


def front_matter(base_model: str, *tags: str) -> str:
    """The head of a model card, which the Hub reads."""
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_model if NAME.fullmatch(base_model) else None,
        tags=["convfusion", "attention-free", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def plain_card(manifest: Mapping[str, Any]) -> str:
    """A card for blocks of which only the manifest is known."""
    base = str(manifest.get("base_model") or "the base model")
    version = markdown_text(manifest.get("version"))
    kinds: dict[str, int] = {}
    for site in manifest["sites"].values():
        mixer = dict(site["mixer"])
        kind = mixer.pop("kind")
        told = [f"{markdown_text(name)} {markdown_text(value)}" for name, value in mixer.items()]
        name = markdown_code(kind) if str(kind).isidentifier() else markdown_text(kind)
        words = f"{name}: {', '.join(told)}"
        kinds[words] = kinds.get(words, 0) + 1
    listed = "\n".join(f"- {count} × {words}" for words, count in kinds.items())
    return f"""{front_matter(base)}# {markdown_text(base)}: blocks in place of self-attention

Made with ConvFusion {version}. Everything but these blocks is the base model, whose
licence holds.

```python
import convfusion
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({python_string(base)})
convfusion.load(pipe, {HERE})
```

{listed}
"""
