"""A site: one attention of a model that a mixer can do, or do a part of."""

from __future__ import annotations

from dataclasses import dataclass

from convfusion.errors import ConvFusionError
from convfusion.families.joint import JointLayout
from convfusion.mixers import Mixer
from convfusion.mixers.base import TokenMixer, build_mixer


@dataclass(frozen=True)
class Site:
    """One self-attention of a model.

    Attributes:
        path: module path of the attention, such as
            `down_blocks.0.attentions.0.transformer_blocks.0.attn1`.
        channels: C of its tokens.
        heads: number of attention heads.
        level: how often the latents were halved before it (0 in a DiT).
        owner: module path of the module whose input tells the grid ('' is the model itself).
        tap: module path of the module whose first input is the hidden state right after this
            site, gated and added to the residual: the feature that distillation compares.
        rank: of its grid: 2 for (H, W), 3 for (T, H, W).
        joint: how text and image share it; None where it is of the image alone.
    """

    path: str
    channels: int
    heads: int
    level: int
    owner: str
    tap: str
    rank: int = 2
    joint: JointLayout | None = None

    def build(self, settings: Mixer) -> TokenMixer:
        """The mixer of some settings for this site.

        Raises:
            ConvFusionError: they do not fit it.
        """
        try:
            return build_mixer(settings, self.channels, self.heads, self.joint is not None)
        except ConvFusionError as wrong:
            raise ConvFusionError(f"{self.path}: {wrong}") from None

    @property
    def block(self) -> str:
        """Module path of the transformer block that it is part of."""
        return self.path.rpartition(".")[0]
