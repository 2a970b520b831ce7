"""UNet2DConditionModel: SD1.x, SD2.x, SDXL and everything of their layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import Transformer2DModel
from torch import nn

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families.base import (
    TEXT_DOCS,
    TIMESTEP_DOCS,
    Denoiser,
    Family,
    Size,
    TextReader,
    is_self_attention,
    transformer_blocks,
)
from convfusion.families.carrier import Carrier, KeywordCarrier
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers import Gate

CLIP_WORDS = 77  # tokens that CLIP's text encoders read
GLM_WORDS = 256  # and Kolors' ChatGLM
REFINER_IDS = 5  # numbers that SDXL's refiner takes of its picture
AESTHETIC_SCORE = 6.0  # the last of them, diffusers' default
PATCHES = 257  # tokens of a picture from CLIP's ViT-H, which IP-Adapter Plus is given

_PLACE = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.")

# Kernel sizes of the paper's reference weights: about 60 % of the effective receptive field that
# was measured at each level. SD2.1 has SD1.5's sites and takes its sizes.
SD15_KERNELS = {
    "down_blocks.0.*": 7,
    "down_blocks.1.*": 9,
    "down_blocks.2.*": 5,
    "mid_block.*": 3,
    "up_blocks.1.*": 5,
    "up_blocks.2.*": 9,
    "up_blocks.3.*": 11,
}
SDXL_KERNELS = {
    "down_blocks.1.*": 9,
    "down_blocks.2.*": 7,
    "mid_block.*": 9,
    "up_blocks.0.*": 9,
    "up_blocks.1.*": 13,
}

# How many sites each block has, which tells the layouts apart.
SD15_LAYOUT = {
    "down_blocks.0": 2,
    "down_blocks.1": 2,
    "down_blocks.2": 2,
    "mid_block": 1,
    "up_blocks.1": 3,
    "up_blocks.2": 3,
    "up_blocks.3": 3,
}
SDXL_LAYOUT = {
    "down_blocks.1": 4,
    "down_blocks.2": 20,
    "mid_block": 10,
    "up_blocks.0": 30,
    "up_blocks.1": 6,
}

_CLASS = "UNet2DConditionModel"


class UNet(Family):
    """UNets whose transformer blocks stand in `Transformer2DModel`s, each with its own grid."""

    name = "unet"
    classes: ClassVar[tuple[str, ...]] = (_CLASS,)
    component = "unet"
    latents = "sample"
    owner_class: ClassVar[type[Any]] = Transformer2DModel  # in which the blocks stand
    presets = {
        "default": {"*": 7},
        "sd15": SD15_KERNELS,
        "sd21": SD15_KERNELS,
        "sdxl": SDXL_KERNELS,
    }
    full_size = {
        "sd15": (_CLASS, {"sample_size": 64, "cross_attention_dim": 768}),
        "sd21": (
            _CLASS,
            {
                "sample_size": 96,
                "attention_head_dim": (5, 10, 20, 20),
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
        ),
        "sdxl": (
            _CLASS,
            {
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": (
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
    }
    released_gate: ClassVar[Gate | None] = "reference"
    input_docs = {
        "sample": "noisy latents, scaled by the scheduler's scale_model_input",
        "timestep": TIMESTEP_DOCS,
        "encoder_hidden_states": TEXT_DOCS,
        "added_cond_kwargs.text_embeds": "pooled output of the second text encoder",
        "added_cond_kwargs.time_ids": "height, width, top, left, target height, target width in "
        "pixels; of a refiner height, width, top, left, aesthetic score",
        "class_labels": "class, or its embedding",
        "timestep_cond": "embedding of the guidance scale",
    }

    def list_sites(self, model: Denoiser) -> list[Site]:
        """Those of its `owner_class`: a motion module attends over time, not space."""
        levels = len(model.config.block_out_channels)
        return [
            Site(
                path=f"{path}.attn1",
                channels=block.attn1.query_dim,
                heads=block.attn1.heads,
                level=level_of(path, levels),
                owner=owner_of(path),
                tap=f"{path}.norm2" if block.attn2 is not None else f"{path}.norm3",
            )
            for path, block in transformer_blocks(model)
            if is_self_attention(block)
            and isinstance(model.get_submodule(owner_of(path)), self.owner_class)
        ]

    def carrier(self, model: Denoiser) -> Carrier:
        return KeywordCarrier.of(Transformer2DModel, patch=1)  # on feature maps

    def preset_for(self, model: Denoiser) -> str:
        """The preset whose layout of sites a model has, else `default`."""
        layout = count_by_block(self.list_sites(model))
        if layout == SDXL_LAYOUT:
            return "sdxl"
        if layout == SD15_LAYOUT:
            return "sd21" if model.config.cross_attention_dim == 1024 else "sd15"
        return "default"

    def latent_unit(self, model: Denoiser) -> int:
        return 2 ** (len(model.config.block_out_channels) - 1)

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        device, prompts = pipe.unet.device, list(prompts)
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if pipe.unet.config.get("addition_embed_type") != "text_time":
            return {"encoder_hidden_states": pipe.encode_prompt(prompts, device, **options)[0]}
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, **options)
        if pipe.config.force_zeros_for_empty_prompt:  # as SDXL draws without a negative prompt
            prompted = torch.tensor([bool(p) for p in prompts], device=device).to(embeds.dtype)
            embeds, pooled = embeds * prompted[:, None, None], pooled * prompted[:, None]
        last = (AESTHETIC_SCORE,) if count_time_ids(pipe.unet) == REFINER_IDS else size
        ids = torch.tensor([[*size, 0, 0, *last]], dtype=embeds.dtype, device=device)
        added = {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    def text_readers(self, pipe: Any) -> tuple[TextReader, ...]:
        """Of the pipelines of SD1.x, SD2.x and SDXL; not of those that take pictures too."""
        kind = type(pipe).__name__
        if kind == "StableDiffusionPipeline":
            masked = bool(getattr(pipe.text_encoder.config, "use_attention_mask", False))
            words = pipe.tokenizer.model_max_length
            return (TextReader("tokenizer", "text_encoder", words, masked=masked),)
        if kind != "StableDiffusionXLPipeline" or pipe.text_encoder is None:
            return super().text_readers(pipe)
        first, second = pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length
        return (
            TextReader("tokenizer", "text_encoder", first, layer=-2),
            TextReader("tokenizer_2", "text_encoder_2", second, layer=-2, pooled=True),
        )

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        config = model.config
        words = words or (GLM_WORDS if config.get("encoder_hid_dim") else CLIP_WORDS)
        inputs: dict[str, Any] = {"encoder_hidden_states": values(batch, words, text_width(model))}
        if added := example_additions(model, batch, values):
            inputs["added_cond_kwargs"] = added
        kind = getattr(config, "class_embed_type", None)
        if kind in ("projection", "simple_projection"):
            inputs["class_labels"] = values(batch, config.projection_class_embeddings_input_dim)
        elif kind == "identity":
            inputs["class_labels"] = values(batch, model.time_embedding.linear_2.out_features)
        elif kind == "timestep" or config.get("num_class_embeds") is not None:
            inputs["class_labels"] = values.zeros(batch)
        elif kind is not None:
            raise unknown_setting(model, "class_embed_type")
        if (
            config.get("time_cond_proj_dim") is not None
        ):  # the guidance of a latent consistency model
            inputs["timestep_cond"] = values(batch, config.time_cond_proj_dim)
        return inputs

    def describe_further_needs(self, model: Denoiser) -> str:
        config = model.config
        if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
            return "pictures for an IP-Adapter"
        if config.get("addition_embed_type") not in (None, "text", "text_time"):
            return "an embedding of a picture"
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            return "class labels"
        if config.get("time_cond_proj_dim"):
            return "the scale of its guidance, as latent consistency models do"
        return ""

    def idle_components(self, pipe: Any) -> tuple[str, ...]:
        """SDXL's refiner has the second text encoder alone."""
        refines = count_time_ids(pipe.unet) == REFINER_IDS and pipe.text_encoder is None
        return ("text_encoder", "tokenizer") if refines else ()


def count_by_block(sites: Sequence[Site]) -> Counter[str]:
    """How many sites each block of a UNet has, by the block's path."""
    places = (re.match(r"(mid_block|\w+_blocks\.\d+)", site.path) for site in sites)
    return Counter(place.group(1) for place in places if place)


def example_additions(model: Denoiser, batch: int, values: Values) -> dict[str, Any]:
    """What goes into `added_cond_kwargs`: SDXL's numbers, pictures for IP-Adapters."""
    config, added = model.config, dict[str, Any]()
    if config.get("addition_embed_type") == "text_time":
        ids = count_time_ids(model)
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        added = {"text_embeds": values(batch, pooled), "time_ids": values(batch, ids)}
    elif config.get("addition_embed_type") not in (None, "text"):
        raise unknown_setting(model, "addition_embed_type")
    if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
        layers = model.encoder_hid_proj.image_projection_layers
        added["image_embeds"] = [values(batch, *picture_shape(layer)) for layer in layers]
    return added


def count_time_ids(model: Denoiser) -> int:
    """How many numbers an SDXL UNet is told of its picture; 0 for another denoiser.

    They are six (size, crop, wanted size), or the refiner's five, with an aesthetic score in place
    of the wanted size. A refiner's one text encoder has pooled outputs as wide as its tokens.
    """
    config = model.config
    if config.get("addition_embed_type") != "text_time":
        return 0
    pooled = config.projection_class_embeddings_input_dim - 5 * config.addition_time_embed_dim
    refines = config.encoder_hid_dim is None and pooled == config.cross_attention_dim
    return REFINER_IDS if refines else 6


def text_width(model: Denoiser) -> int:
    """Of the tokens of the text, before any projection in the model."""
    config = model.config
    projection = getattr(model, "text_encoder_hid_proj", None)  # Kolors' beside an IP-Adapter
    if getattr(config, "encoder_hid_dim_type", None) == "text_proj" or projection is not None:
        return config.encoder_hid_dim
    if getattr(config, "encoder_hid_dim_type", None) not in (None, "ip_image_proj"):
        raise unknown_setting(model, "encoder_hid_dim_type")
    widths = config.cross_attention_dim
    if isinstance(widths, int):
        return widths
    if len(set(widths)) > 1:
        raise unknown_setting(model, "cross_attention_dim")
    return widths[0]


def picture_shape(layer: nn.Module) -> tuple[int, ...]:
    """Of one picture for the projection of an IP-Adapter, without the batch."""
    kind = type(layer).__name__
    width = next(part.in_features for part in layer.modules() if isinstance(part, nn.Linear))
    if kind in ("ImageProjection", "IPAdapterFaceIDImageProjection"):
        return (1, width)
    if kind in ("IPAdapterPlusImageProjection", "IPAdapterFullImageProjection"):
        return (1, PATCHES, width)
    raise ConvFusionError(f"the inputs of an IP-Adapter with {kind} cannot be made up: unload it")


def unknown_setting(model: Denoiser, name: str) -> ConvFusionError:
    """The error for a setting of a model's config that inputs cannot be made up for."""
    return ConvFusionError(
        f"inputs cannot be made up for a {type(model).__name__} with {name} "
        f"{model.config.get(name)!r}"
    )


def owner_of(path: str) -> str:
    """Module path of the transformer that a block is part of."""
    return path.rsplit(".transformer_blocks.", 1)[0]


def level_of(path: str, levels: int) -> int:
    """How often the latents were halved before a transformer block of a UNet."""
    match = _PLACE.match(path)
    if match is None:
        raise UnsupportedModelError(f"{path} is in no down, mid or up block")
    kind, index = match.group(1), int(match.group(2) or 0)
    return {"down_blocks": index, "mid_block": levels - 1, "up_blocks": levels - 1 - index}[kind]


UNET = UNet()
