"""WanTransformer3DModel: Wan 2.1 and 2.2, whose tokens lie in frames, rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from convfusion.families.base import TEXT_DOCS, TIMESTEP_DOCS, Denoiser, Family, Size
from convfusion.families.carrier import RotaryCarrier
from convfusion.families.rotary import PairTurn
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers import DeltaConv, Halo

UMT5_WORDS = 512  # tokens that its text encoder reads
LARGE_CHANNELS = 48  # of the latents of Wan 2.2's own autoencoder, each of 16×16 pixels
PATCHES = 257  # tokens of a picture from CLIP's ViT-H, which image-to-video models are given
NATIVE_LATENTS = (60, 104)  # of 480×832 pixels

VIDEO_KERNELS = DeltaConv(kernel_size=7, frame_kernel_size=3, first_frame_branch=True)
VIDEO_HALO = Halo(block=(2, 4, 4), window=(4, 8, 8), cells=(3, 4, 4))

_CLASS = "WanTransformer3DModel"


class Wan(Family):
    """Transformers on patches of the latents of a video, with rotary embeddings.

    Attributes:
        native: (height, width) of the latents that its models were trained on.
    """

    name = "wan"
    classes: ClassVar[tuple[str, ...]] = (_CLASS,)
    component = "transformer"
    further_components = ("transformer_2",)  # of Wan 2.2, for the last, least noisy steps
    latents = "hidden_states"
    presets = {"wan": {"*": VIDEO_KERNELS}}
    halo = VIDEO_HALO
    full_size = {
        "wan-1.3b": (
            _CLASS,
            {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "cross_attn_norm": True},
        ),
        "wan-14b": (_CLASS, {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}),
        "wan-14b-image": (  # of a first frame
            _CLASS,
            {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        ),
        "wan2.2-5b": (
            _CLASS,
            {
                "num_attention_heads": 24,
                "num_layers": 30,
                "ffn_dim": 14336,
                "in_channels": 48,
                "out_channels": 48,
            },
        ),
    }
    input_docs = {
        "hidden_states": "noisy latents of a video, [B, C, T, H, W]",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "encoder_hidden_states_image": "embedding of the first frame",
    }
    attention_classes: ClassVar[tuple[type[nn.Module], ...]] = (WanAttention,)
    frames = 21  # of 81 frames of a video
    rotary = True
    native: ClassVar[Size] = NATIVE_LATENTS

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_blocks(model, "blocks")

    def carrier(self, model: Denoiser) -> RotaryCarrier:
        return RotaryCarrier(tuple(model.config.patch_size))

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PairTurn:
        return PairTurn.of((*args, *kwargs.values()))

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size[-1]

    def latent_pixels(self, model: Denoiser) -> int:
        return 16 if model.config.out_channels == LARGE_CHANNELS else self.pixels_per_latent

    def native_latents(self, model: Denoiser) -> Size:
        return self.native

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        embeds, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=UMT5_WORDS,
            device=pipe.transformer.device,
        )
        return {"encoder_hidden_states": embeds}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        """With a picture beside the text, which then always has as many words as it can."""
        config = model.config
        if config.image_dim is None:
            return {"encoder_hidden_states": values(batch, words or UMT5_WORDS, config.text_dim)}
        pictures = batch if config.pos_embed_seq_len is None else 2 * batch  # first and last frame
        return {
            "encoder_hidden_states": values(batch, UMT5_WORDS, config.text_dim),
            "encoder_hidden_states_image": values(pictures, PATCHES, config.image_dim),
        }

    def describe_further_needs(self, model: Denoiser) -> str:
        return "an embedding of its first frame" if model.config.image_dim is not None else ""


def list_blocks(model: Denoiser, name: str) -> list[Site]:
    """The self-attentions of a list of Wan's blocks."""
    return [
        Site(
            path=f"{name}.{number}.attn1",
            channels=block.attn1.inner_dim,
            heads=block.attn1.heads,
            level=0,
            owner="",
            tap=f"{name}.{number}.norm2",
            rank=3,
        )
        for number, block in enumerate(getattr(model, name))
    ]


WAN = Wan()
