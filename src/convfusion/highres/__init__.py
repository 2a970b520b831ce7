"""Pictures far above a model's own size: the ladder, its memory, and the autoencoder in tiles."""

from convfusion.highres.ladder import (
    Ladder,
    Plan,
    Start,
    highres,
    is_large,
    last_steps,
    plan_for,
    rungs,
)
from convfusion.highres.vae_tiles import Tiles

__all__ = [
    "Ladder",
    "Plan",
    "Start",
    "Tiles",
    "highres",
    "is_large",
    "last_steps",
    "plan_for",
    "rungs",
]
