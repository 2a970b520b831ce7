"""Settings of a mixer on the values of an image that shares its softmax with a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from convfusion.errors import ConvFusionError
from convfusion.mixers.base import Mixer, TokenMixer
from convfusion.mixers.delta_conv import DeltaConv
from convfusion.mixers.joint import Share, SharedMixer
from convfusion.mixers.plain import Depthwise, MeanOnly

DELTA_CONV = DeltaConv()


@dataclass(frozen=True)
class Shared:
    """A mixer on the values of an image that shares its softmax with a text.

        y = σ(g)·A_I + (1 − σ(g))·A_T,   g = LSE_I − LSE_T

    with A_I from the mixer and LSE_I estimated from the query q of each token.

    Attributes:
        mixer: settings of what mixes the values of the image.
        share: how LSE_I is estimated. `predicted`: log N + a_h + b_h·q + q·k̄/√d, with the mean key
            k̄ of the image and learned a_h and b_h of each head. `cells`: a_h + b_h·q +
            log Σ_c n_c·exp(q·k̄_c/√d) over the mean keys of 4×4 cells of n_c tokens. `constant`: no
            estimate; σ(g) is N/(N + T) everywhere.
    """

    mixer: Mixer = DELTA_CONV
    share: Share = "predicted"

    def __post_init__(self) -> None:
        if self.share not in get_args(Share):
            raise ConvFusionError(
                f"share must be {' or '.join(get_args(Share))}, not {self.share!r}"
            )
        if not isinstance(self.mixer, DeltaConv | MeanOnly | Depthwise):
            raise ConvFusionError(
                f"{type(self.mixer).__name__} does not mix the values of an image alone: give "
                "DeltaConv, MeanOnly or Depthwise"
            )

    def build(self, channels: int, heads: int = 1) -> TokenMixer:
        """Where the image has an attention for itself, the mixer alone."""
        return self.mixer.build(channels, heads)

    def build_joint(self, channels: int, heads: int) -> SharedMixer:
        return SharedMixer(channels, heads, self.mixer, self.share, self)
