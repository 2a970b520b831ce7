"""WanVACETransformer3DModel: a Wan beside which further blocks read a video to be edited."""

from __future__ import annotations

from typing import Any

from convfusion.families.base import Denoiser
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.families.wan import VIDEO_KERNELS, Wan, list_blocks

_CLASS = "WanVACETransformer3DModel"


class WanVACE(Wan):
    """Wan for making and editing videos (VACE). The blocks of a Wan fit its own `blocks`."""

    name = "wan_vace"
    classes = (_CLASS,)
    presets = {"wan-vace": {"*": VIDEO_KERNELS}}
    full_size = {
        "wan-vace-1.3b": (
            _CLASS,
            {
                "num_attention_heads": 12,
                "num_layers": 30,
                "ffn_dim": 8960,
                "vace_layers": tuple(range(0, 30, 2)),
            },
        ),
        "wan-vace-14b": (_CLASS, {}),
    }
    input_docs = {
        **Wan.input_docs,
        "control_hidden_states": "latents of the video to be edited, and of its masks",
    }
    shares_blocks_with = "wan"

    def list_sites(self, model: Denoiser) -> list[Site]:
        return [*list_blocks(model, "blocks"), *list_blocks(model, "vace_blocks")]

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        made = super().example_conditioning(model, batch, words, values)
        channels = model.config.vace_in_channels
        return {**made, "control_hidden_states": values(batch, channels, *values.sides)}

    def describe_further_needs(self, model: Denoiser) -> str:
        return "a video to be edited, with masks"


WAN_VACE = WanVACE()
