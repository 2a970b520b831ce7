"""A site: one attention of a model that a mixer can do, or do a part of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def list_joint_sites(
    model: Any, lists: Sequence[str], attention: str, tap: str, layout: JointLayout
) -> list[Site]:
    """The attentions that text and image share in all blocks of a transformer.

    Args:
        model: a denoiser.
        lists: names of the lists of its blocks.
        attention: name of the attention of a block.
        tap: name of the module of a block that is the site's tap.
        layout: how text and image share it.
    """
    return [
        Site(
            path=f"{name}.{number}.{attention}",
            channels=block.get_submodule(attention).inner_dim,
            heads=block.get_submodule(attention).heads,
            level=0,
            owner="",
            tap=f"{name}.{number}.{tap}",
            joint=layout,
        )
        for name in lists
        for number, block in enumerate(getattr(model, name))
    ]
