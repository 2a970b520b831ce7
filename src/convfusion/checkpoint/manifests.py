"""The manifest of a checkpoint: what its blocks are, whose, and what they have been through."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from convfusion.checkpoint.named import BLOCKS, MANIFEST
from convfusion.errors import CheckpointError
from convfusion.families import block_family, denoiser_of, list_sites
from convfusion.files import file_digest, read_json, read_notes, unreadable
from convfusion.mixers import mixer_to_dict
from convfusion.mixers.base import TokenMixer
from convfusion.surgery.record import TrainingRecord, joint_record

FORMAT = 1
NOTE = "convfusion"  # in the header of the tensors: the manifest


def make_manifest(
    pipe_or_model: Any, mixers: dict[str, TokenMixer], digest: str | None = None
) -> dict[str, Any]:
    """What the manifest of a model's mixers says, with the digest of their file if there is one."""
    from convfusion import __version__

    model = denoiser_of(pipe_or_model)
    named = str(getattr(pipe_or_model.config, "_name_or_path", "") or "")
    sites = {site.path: site for site in list_sites(model)}
    return {
        "format": FORMAT,
        "version": __version__,
        "family": block_family(model),
        "base_model": public_name(named),
        **({} if digest is None else {"sha256": digest}),
        **joint_record(mixers.values()).to_dict(),
        "sites": {
            path: {
                "channels": sites[path].channels,
                **({} if sites[path].joint is None else {"joint": True}),
                "mixer": mixer_to_dict(mixer.config),
            }
            for path, mixer in mixers.items()
        },
    }


def public_name(name: str) -> str:
    """A Hub name, also out of a cache path; of any other path only its last part."""
    cached = re.search(r"models--(.+?)--([^/\\\\]+)", name)
    if cached:
        return "/".join(cached.groups())
    path = Path(name)
    local = path.is_absolute() or name.startswith(".") or path.exists() or len(path.parts) > 2
    return path.name if local else name


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of blocks, as far as it can be checked without their model.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    return _checked_manifest(path, read_json(path))


def read_note(path: Path) -> dict[str, Any] | None:
    """The manifest in the header of a file that `save` wrote; None for another file."""
    note = read_notes(path).get(NOTE)
    if note is None:
        return None
    try:
        manifest = json.loads(note)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    return _checked_manifest(path, manifest)


def _checked_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of format {FORMAT}")
    sites = manifest.get("sites")
    if not isinstance(sites, dict) or not all(
        isinstance(site, dict) and {"channels", "mixer"} <= site.keys() for site in sites.values()
    ):
        raise CheckpointError(f"{path}: `sites` must map paths to channels and mixers")
    read_record(path, manifest)
    return manifest


def read_record(path: Path, manifest: dict[str, Any]) -> TrainingRecord:
    """What blocks have been through, as their manifest says."""
    try:
        return TrainingRecord.from_dict(manifest)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error} does not say whether the blocks are trained, as "
            '`"trained": {"steps": 1000}` or `"trained": false` would'
        ) from None


def check_digest(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse tensors that are not those that the manifest was written for."""
    if manifest.get("sha256") != file_digest(folder / BLOCKS):
        raise CheckpointError(
            f"{folder / BLOCKS} is not the file that {MANIFEST} beside it was written for: it is "
            "damaged, or the writing of it was cut short; save it again"
        )
