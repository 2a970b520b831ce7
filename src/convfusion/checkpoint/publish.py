"""Blocks put on the Hugging Face Hub, with a model card."""

from __future__ import annotations

from pathlib import Path

from convfusion.checkpoint import hub
from convfusion.checkpoint.blocks import check_digest, read_manifest
from convfusion.checkpoint.named import BLOCKS, MANIFEST
from convfusion.files import read_header


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Blocks by ConvFusion",
) -> str:
    """Upload blocks."""
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    read_header(folder / BLOCKS)
    check_digest(folder, manifest)
    written = folder / hub.CARD
    card = written.read_text(encoding="utf-8") if written.is_file() else hub.plain_card(manifest)
    return hub.upload(
        folder,
        (BLOCKS, MANIFEST),
        repo_id,
        card=card,
        private=private,
        revision=revision,
        message=message,
    )
