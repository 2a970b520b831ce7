"""Blocks by what somebody calls them: a path, a name in the package, or a name on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convfusion.checkpoint import hub
from convfusion.errors import CheckpointError

BLOCKS, MANIFEST = "blocks.safetensors", "convfusion.json"

STUDENTS = Path(__file__).parents[1] / "mini" / "students"
# Folders of blocks that come with the package, by name.
PACKAGED = {"mini": STUDENTS / "near", "mini-delta": STUDENTS / "delta_conv"}


@dataclass(frozen=True)
class HubName:
    """Blocks on the Hub: a repository, `user/name`, and a branch, tag or commit of it."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def find_blocks(source: str | Path, revision: str | None = None) -> Path | HubName:
    """What blocks of that name are, found without a connection and without reading any.

    The first of these holds:

    1. a folder or file at that path: what was saved under a name is what loads by it;
    2. a name in `PACKAGED`: the blocks that come with the package;
    3. `user/name` or `user/name@revision`: a repository on the Hub.

    Args:
        source: a path or a name. `./mini` is always a path.
        revision: branch, tag or commit of a name on the Hub.

    Returns:
        A path that exists, or a name on the Hub.

    Raises:
        CheckpointError: there is nothing of that name, or a revision of what is not on the Hub.
    """
    text = str(source)
    repo_id, at, named = text.partition("@")
    found: Path | HubName | None = None
    if Path(text).exists():
        found = Path(text)
    elif text in PACKAGED:
        found = PACKAGED[text]
    elif text.endswith(".safetensors"):
        raise CheckpointError(f"{text} cannot be read: there is no such file")
    elif hub.NAME.fullmatch(repo_id):
        if at and (not named or revision not in (None, named)):
            raise CheckpointError(f"{text}: give one revision, as user/name@revision")
        return HubName(repo_id, named or revision)
    if found is None:
        raise CheckpointError(
            f"{text} is no folder here, no name on the Hub (user/name), and none of the blocks "
            f"that come with ConvFusion ({', '.join(PACKAGED)})"
        )
    if revision is not None:
        raise CheckpointError(f"a revision is of a name on the Hub, user/name, not of {text}")
    return found


def fetch_blocks(source: str | Path, revision: str | None = None) -> Path:
    """The folder or file with blocks of that name, from the Hub or its cache where it is there.

    Args:
        source, revision: as for `find_blocks`.

    Raises:
        CheckpointError: as `find_blocks`; or the Hub has no such repository, or is out of reach.
    """
    found = find_blocks(source, revision)
    if isinstance(found, HubName):
        return hub.fetch(found.repo_id, (BLOCKS, MANIFEST), found.revision)
    return found
