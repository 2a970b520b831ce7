"""The Hugging Face Hub: files uploaded in one commit, blocks and pipelines fetched by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from convfusion.checkpoint.loading import check_index
from convfusion.errors import CheckpointError, ConvFusionError, first_line

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a repository, owner/name

FAILURES = (OSError, HfHubHTTPError, HFValidationError)


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    message: str,
) -> str:
    """Put files into a repository, made if need be, in one commit; its address.

    Args:
        files: on disk or as bytes, by their path in the repository.
        repo_id: `user/name`.
        private: of a repository that is new.
        revision: branch to write to, by default the main one.
        message: of the commit.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached.
    """
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except Exception as error:  # of the client, or of one of the HTTP libraries beneath it
        refused = getattr(getattr(error, "response", None), "status_code", None) == 401
        advice = "; log in with `hf auth login`" if refused else ""
        raise CheckpointError(
            f"{repo_id} cannot be written to: {first_line(error)}{advice}"
        ) from None
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
