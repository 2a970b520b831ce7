"""Training data: where it comes from, and the latents that it is encoded into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convfusion.imports import lazy

if TYPE_CHECKING:
    from convfusion.data.cache import build_cache, open_cache
    from convfusion.data.clips import list_clips, read_clip, save_strip, write_clip
    from convfusion.data.latents import LatentDataset, TrainingData, hold_out, prepare_data
    from convfusion.data.sources import Drawing, open_source
    from convfusion.data.store import LatentCache

_HOME = {
    "build_cache": "cache",
    "open_cache": "cache",
    "list_clips": "clips",
    "read_clip": "clips",
    "save_strip": "clips",
    "write_clip": "clips",
    "LatentDataset": "latents",
    "TrainingData": "latents",
    "hold_out": "latents",
    "prepare_data": "latents",
    "Drawing": "sources",
    "open_source": "sources",
    "LatentCache": "store",
}
__all__ = sorted(_HOME)

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
