"""Blocks put on the Hugging Face Hub, checked before anything is sent, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from convfusion.checkpoint import card, hub
from convfusion.checkpoint.figures import SUMMARY, describe_figures
from convfusion.checkpoint.licenses import LICENSES, OTHER
from convfusion.checkpoint.manifests import check_digest, read_manifest
from convfusion.checkpoint.named import BLOCKS, MANIFEST
from convfusion.errors import CheckpointError
from convfusion.families import FAMILIES
from convfusion.files import FLOATS, few, read_header, read_tensors
from convfusion.mixers import mixer_from_dict, mixer_to_dict
from convfusion.mixers.base import build_mixer
from convfusion.surgery.record import TrainingRecord
from convfusion.text import read_text

CARD = "README.md"
EVALUATION = "evaluation"  # the folder with figures, beside the blocks and in the repository
PICTURES = ("losses.png", "validation/*.png")  # what the card of a run may show


@dataclass(frozen=True)
class Publication:
    """What goes to the Hub.

    Attributes:
        repo_id: `user/name`.
        base_model: name of the base model on the Hub.
        card: text of the model card.
        files: by their path in the repository.
    """

    repo_id: str
    base_model: str
    card: str
    files: Mapping[str, Path]


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: str | Path | None = None,
) -> Publication:
    """What `push` would upload, checked without a connection.

    Args:
        folder: with blocks that `save` or `distill` wrote. A `README.md` in it becomes the card,
            completed by what is given here; without one a card is made from the manifest.
        repo_id: `user/name`.
        license: short name of the licence of the blocks, as the Hub has it (`apache-2.0`). By
            default what the card in the folder says.
        base_model: name of the base model on the Hub. By default what the card or the manifest
            says.
        evaluation: folder that `convfusion evaluate` wrote for these blocks; by default
            `evaluation` in the folder, if it is there. Its figures go into the card.

    Raises:
        CheckpointError: the blocks are not whole or were never started; or it is not said which
            model they are for, under which licence they are, or where they come from; or the Hub
            knows no such licence; or the evaluation is of other blocks.
    """
    if not hub.NAME.fullmatch(repo_id):
        raise CheckpointError(f"a name on the Hub looks like user/name, not like {repo_id}")
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    check_content(folder, manifest)
    check_origin(folder, manifest)
    written = read_text(folder / CARD) if (folder / CARD).is_file() else None
    head = card.read_head(written, str(folder / CARD)) if written else {}
    base = choose_base(base_model or head.get("base_model"), manifest.get("base_model"), folder)
    named = choose_license(license or head.get("license"), head, folder)
    files = {name: folder / name for name in (BLOCKS, MANIFEST)}
    for pattern in PICTURES:
        for path in sorted(folder.glob(pattern)):
            files[path.relative_to(folder).as_posix()] = path
    figures = None
    place = folder / EVALUATION if evaluation is None else Path(evaluation)
    if evaluation is not None or (place / SUMMARY).is_file():
        figures = describe_figures(place, folder / BLOCKS)
        files[f"{EVALUATION}/{SUMMARY}"] = place / SUMMARY
    text = written or card.plain_card(manifest, base, named)
    text = card.complete_card(text, manifest, base, named, figures)
    return Publication(repo_id, base, card.name_repository(text, repo_id), files)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: str | Path | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = "Blocks by ConvFusion",
) -> str:
    """Upload blocks to the Hugging Face Hub, with their model card, in one commit.

    The blocks, their manifest, the card, the pictures that a run's card shows and the figures of
    an evaluation go there; checkpoints and caches stay. One must be logged in, as with
    `hf auth login`. `load` then takes the name, as `user/name` or `user/name@revision`.

    Args:
        folder, repo_id, license, base_model, evaluation: as for `prepare`, which checks them
            before anything is sent. The repository is made if there is none.
        private: of a repository that is new.
        revision: branch to write to, by default the main one.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: as `prepare`; or the Hub refuses or cannot be reached.
    """
    ready = prepare(folder, repo_id, license=license, base_model=base_model, evaluation=evaluation)
    return upload(ready, private=private, revision=revision, message=message)


def upload(
    ready: Publication,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Blocks by ConvFusion",
) -> str:
    """Send what `prepare` checked; arguments and errors are those of `push`."""
    content: dict[str, Path | bytes] = {CARD: ready.card.encode(), **ready.files}
    return hub.upload(content, ready.repo_id, private=private, revision=revision, message=message)


def check_content(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse blocks that no model could load, as far as that can be told without a model."""
    if manifest.get("family") not in FAMILIES:
        raise CheckpointError(
            f"{folder / MANIFEST} names no family of models: it must be one of "
            f"{', '.join(FAMILIES)}"
        )
    expected: set[str] = set()
    for path, site in manifest["sites"].items():
        mixer = mixer_from_dict(site["mixer"])
        if mixer_to_dict(mixer) != site["mixer"] or type(site["channels"]) is not int:
            raise CheckpointError(f"{folder / MANIFEST} does not say all settings of {path}")
        with torch.device("meta"):  # heads change the shapes of tensors, and not their names
            names = build_mixer(mixer, site["channels"], 1, bool(site.get("joint"))).state_dict()
        expected |= {f"{path}.mixer.{name}" for name in names}
    header = read_header(folder / BLOCKS)
    check_digest(folder, dict(manifest))
    if wrong := expected ^ header.keys():
        raise CheckpointError(f"{folder / BLOCKS} is not what {MANIFEST} describes: {few(wrong)}")
    if odd := [name for name, info in header.items() if info.dtype not in FLOATS]:
        raise CheckpointError(f"{folder / BLOCKS} has tensors that are no floats: {few(odd)}")
    tensors = read_tensors(folder / BLOCKS)
    if damaged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{folder / BLOCKS} has NaN or infinite values: {few(damaged)}")


def check_origin(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse blocks that know nothing, and those of which nobody says how they came about."""
    record = TrainingRecord.from_dict(manifest)
    if record.origin == "unknown":
        raise CheckpointError(
            f"{folder / MANIFEST} does not say how these blocks were made: load them into their "
            "model, train or start them, and save them again"
        )
    if not record.is_started and read_header(folder / BLOCKS):
        raise CheckpointError(
            f"the blocks in {folder} are as `convert` made them, and draw noise: train them with "
            "`convfusion distill`, or start them with `convfusion convert --measure`"
        )


def choose_base(told: Any, recorded: Any, folder: Path) -> str:
    """The name of the base model on the Hub: as told, or else as the manifest has it.

    A manifest has only the last part of a folder that the model was loaded from, which says
    nothing to others.
    """
    base = told or recorded
    if not isinstance(base, str) or not hub.NAME.fullmatch(base):
        said = f" ({told} does not look like user/name)" if told else ""
        raise CheckpointError(
            f"{folder} does not say which model on the Hub these blocks are for{said}: name it as "
            "base_model (--base-model user/name)"
        )
    return base


def choose_license(license: Any, head: Mapping[str, Any], folder: Path) -> str:
    """The short name of a licence, as the Hub has it."""
    if not isinstance(license, str) or not license:
        raise CheckpointError(
            f"{folder} does not say under which licence these blocks are: name it as license "
            "(--license), by its short name on the Hub, such as apache-2.0"
        )
    if license not in LICENSES:
        near = get_close_matches(license.lower().replace(" ", "-"), sorted(LICENSES), n=1)
        meant = f" ({near[0]}?)" if near else ""
        raise CheckpointError(
            f"{license} is no licence that the Hub knows{meant}: give its short name there, such "
            "as creativeml-openrail-m, or `other`"
        )
    if license == OTHER and not {"license_name", "license_link"} <= head.keys():
        raise CheckpointError(
            "the licence `other` needs license_name and license_link in the head of a README.md "
            f"in {folder}"
        )
    return license
