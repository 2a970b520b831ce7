"""The text-to-image teachers: in the layouts of Stable Diffusion and of PixArt.

Each has a tokenizer, a denoiser and a text encoder to train together, and makes them a diffusers
pipeline. Both share the autoencoder; the noise schedule is also that of the class-conditional one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 192  # of the text encoders


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class StableDiffusion:
    """A UNet of 7.3M parameters under a CLIP text encoder."""

    pipeline = StableDiffusionPipeline
    denoiser_name = "unet"

    def make_tokenizer(self, run: Path, captions: Iterable[str]) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(run / "tokenizer")

    def make_denoiser(self) -> UNet2DConditionModel:
        """Seven self-attention sites: three on 16×16 tokens, three on 8×8, one on 4×4."""
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 160),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # the number of heads: diffusers' old name for it
            norm_num_groups=16,
        )
        unet.set_attn_processor(AttnProcessor())  # on CPU faster to train than the fused one
        return unet

    def make_text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=1.0,
        )
        return CLIPTextModel(config)

    def predict(self, parts: Any, tokens: Any, noisy: torch.Tensor, t: torch.Tensor):
        text = parts["text"](tokens.input_ids)[0]
        return parts["unet"](noisy, t, text, return_dict=False)[0]

    def extras(self) -> dict[str, Any]:
        """What the pipeline wants beside its models."""
        none = ("safety_checker", "feature_extractor")
        return {**dict.fromkeys(none), "requires_safety_checker": False}


class PixArt:
    """A transformer of eight blocks on 16×16 tokens under a T5 encoder, PixArt-Σ's layout."""

    pipeline = PixArtSigmaPipeline
    denoiser_name = "transformer"

    def make_tokenizer(self, run: Path, captions: Iterable[str]) -> T5Tokenizer:
        """Every word of the captions is a piece; the letters stand by for other words."""
        words = {word for text in captions for word in text.replace(",", " ").split()}
        letters = {letter for word in words for letter in word}
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", -1.0), ("▁", -9.0)]
        pieces += [(f"▁{word}", -2.0) for word in sorted(words)]
        pieces += [(letter, -9.0) for letter in sorted(letters - {",", "▁"})]
        return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=24)

    def make_denoiser(self) -> PixArtTransformer2DModel:
        transformer = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=40,
            in_channels=4,
            out_channels=4,  # no learned variance
            num_layers=8,
            cross_attention_dim=160,
            sample_size=16,
            patch_size=1,
            caption_channels=WIDTH,
        )
        transformer.set_attn_processor(AttnProcessor())
        torch.nn.init.zeros_(transformer.proj_out.weight)  # as DiT starts
        return transformer

    def make_text_encoder(self, tokenizer: T5Tokenizer) -> T5EncoderModel:
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=48,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        return T5EncoderModel(config)

    def predict(self, parts: Any, tokens: Any, noisy: torch.Tensor, t: torch.Tensor):
        mask = tokens.attention_mask
        return parts["transformer"](
            noisy,
            encoder_hidden_states=parts["text"](tokens.input_ids, attention_mask=mask)[0],
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]

    def extras(self) -> dict[str, Any]:
        return {}


FAMILIES = {"sd": StableDiffusion(), "pixart": PixArt()}
