"""Pictures far above a model's own size: the ladder, its memory, and the autoencoder in tiles."""

from convfusion.highres.ladder import (
    Ladder,
    LadderPlan,
    Start,
    highres,
    is_large,
    keep_last_steps,
    list_rungs,
    plan_ladder,
)
from convfusion.highres.vae_tiles import VaeTiles

__all__ = [
    "Ladder",
    "LadderPlan",
    "Start",
    "VaeTiles",
    "highres",
    "is_large",
    "keep_last_steps",
    "list_rungs",
    "plan_ladder",
]
