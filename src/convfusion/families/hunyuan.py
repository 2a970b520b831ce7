"""HunyuanDiT2DModel: transformers on patches, whose rotary embedding comes from the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convfusion.errors import ConvFusionError
from convfusion.families.base import Denoiser, Family, Size
from convfusion.families.carrier import argument_position
from convfusion.families.rotary import PairTurn
from convfusion.families.sites import Site
from convfusion.families.values import Values

ORIGINAL = (1024, 1024)  # size of the picture that a pipeline tells an older model of
TRAINED_SIDE = 64  # of the latents that places are counted in
NUMBERS = 6  # that older ones take of their picture: its size, the wanted size, and the crop

_CLASS = "HunyuanDiT2DModel"
_ROTARY = "image_rotary_emb"


@dataclass(frozen=True)
class GivenRotaryCarrier:
    """Sends the grid behind a rotary embedding (cos, sin) that is an argument of the owner.

    Attributes:
        patch: side of a patch; the grid is ⌊H/patch⌋ × ⌊W/patch⌋ of the owner's maps.
        position: where the embedding stands among the positional arguments.
    """

    patch: int
    position: int

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        maps: Tensor = args[0] if args else kwargs["hidden_states"]
        return maps.shape[-2] // self.patch, maps.shape[-1] // self.patch

    def attach(self, owner: nn.Module) -> RemovableHandle:
        return owner.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        positional = len(args) > self.position
        rotary = args[self.position] if positional else kwargs.get(_ROTARY)
        if rotary is None:
            raise ConvFusionError(
                f"a converted {type(module).__name__} must be given {_ROTARY}, as its pipeline does"
            )
        cosine, sine = rotary
        carried = (cosine, sine, cosine.new_empty((*self.grid(args, kwargs), 0)))
        if positional:
            return (*args[: self.position], carried, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, _ROTARY: carried}


class HunyuanDiT(Family):
    """Transformers with cross-attention to the tokens of two text encoders, CLIP and T5."""

    name = "hunyuandit"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"hunyuandit": {"*": 13}}  # as PixArt, whose grids it has
    full_size = {
        "hunyuandit": (  # 1.2
            _CLASS,
            {
                "sample_size": 128,
                "in_channels": 4,
                "patch_size": 2,
                "hidden_size": 1408,
                "num_layers": 40,
                "mlp_ratio": 4.3637,
                "use_style_cond_and_image_meta_size": False,
            },
        )
    }
    call_options = {"use_resolution_binning": False}
    rotary = True

    def list_sites(self, model: Denoiser) -> list[Site]:
        return [
            Site(
                path=f"blocks.{number}.attn1",
                channels=block.attn1.query_dim,
                heads=block.attn1.heads,
                level=0,
                owner="",
                tap=f"blocks.{number}.norm2",
            )
            for number, block in enumerate(model.blocks)
        ]

    def carrier(self, model: Denoiser) -> GivenRotaryCarrier:
        position = argument_position(HunyuanDiT2DModel, _ROTARY)
        return GivenRotaryCarrier(model.config.patch_size, position)

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PairTurn:
        return PairTurn.of((*args, *kwargs.values()))

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """With its rotary embedding, and with timesteps in the dtype of what it makes of them."""
        arranged = super().arrange_inputs(model, latents, timesteps.to(model.dtype), conditioning)
        if _ROTARY not in arranged:
            arranged[_ROTARY] = make_rotary(model, latents)
        return arranged

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        """Those of both encoders; an older model is told the size of its picture and a style."""
        model, inputs = pipe.transformer, {}
        config, device = model.config, model.device
        readers = {"": config.text_len, "_t5": config.text_len_t5}
        for encoder, (name, words) in enumerate(readers.items()):
            embeds, _, mask, _ = pipe.encode_prompt(
                list(prompts), device=device, dtype=model.dtype, do_classifier_free_guidance=False,
                max_sequence_length=words, text_encoder_index=encoder,
            )  # fmt: skip
            inputs[f"encoder_hidden_states{name}"] = embeds
            inputs[f"text_embedding_mask{name}"] = mask
        if config.use_style_cond_and_image_meta_size:
            numbers = torch.tensor([[*ORIGINAL, *size, 0, 0]], dtype=model.dtype, device=device)
            inputs["image_meta_size"] = numbers.repeat(len(prompts), 1)
            inputs["style"] = torch.zeros(len(prompts), dtype=torch.long, device=device)
        return inputs

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        """Always as many words as its padding has, whatever is asked for."""
        config, (height, width) = model.config, values.sides
        tokens = (height // config.patch_size) * (width // config.patch_size)
        first, second = config.text_len, config.text_len_t5
        rotary = (tokens, config.attention_head_dim)
        inputs = {
            "timestep": values.filled(500.0, batch),  # its dtype is that of what is made of it
            "encoder_hidden_states": values(batch, first, config.cross_attention_dim),
            "text_embedding_mask": values.filled(1.0, batch, first),
            "encoder_hidden_states_t5": values(batch, second, config.cross_attention_dim_t5),
            "text_embedding_mask_t5": values.filled(1.0, batch, second),
            _ROTARY: (values(*rotary), values(*rotary)),
        }
        if config.use_style_cond_and_image_meta_size:
            inputs["image_meta_size"] = values(batch, NUMBERS)
            inputs["style"] = values.zeros(batch)
        return inputs

    def check_export(self, model: Denoiser) -> None:
        raise ConvFusionError(
            f"a {type(model).__name__} is not exported: its rotary embedding would be of one size"
        )


def make_rotary(model: Denoiser, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding that its pipelines give for latents [B, C, H, W]: (cos, sin), [N, d]."""
    from diffusers.pipelines.hunyuandit import pipeline_hunyuandit as pipelines

    patch = model.config.patch_size
    grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
    return pipelines.get_2d_rotary_pos_embed(
        model.config.attention_head_dim,
        pipelines.get_resize_crop_region_for_grid(grid, TRAINED_SIDE // patch),
        grid,
        device=latents.device,
        output_type="pt",
    )


HUNYUAN_DIT = HunyuanDiT()
