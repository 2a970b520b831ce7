"""One table of tiny random models, in the layout of every family that can be converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    CosmosTransformer3DModel,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    Kandinsky5Transformer3DModel,
    LatteTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SkyReelsV2Transformer3DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from tiny_joint import chroma, flux, lumina2, prx, qwenimage, sd35, zimage
from torch import Tensor, nn

from convfusion.families import example_inputs, family_of, list_sites, site_grid
from convfusion.families.placed import PlacedCarrier
from convfusion.mixers import Halo, Mixer

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
DOWN, UP = "DownBlock2D", "UpBlock2D"


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, norm_num_groups=8, cross_attention_dim=options.pop("cross", 16), **options
    )


def sd15() -> UNet2DConditionModel:
    return _unet(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, CROSS_UP, CROSS_UP),
        layers_per_block=2,
        attention_head_dim=2,
    )


def sd21() -> UNet2DConditionModel:
    return _unet(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, CROSS_UP, CROSS_UP),
        layers_per_block=2,
        attention_head_dim=(1, 2, 4, 4),
        use_linear_projection=True,
        cross=1024,
    )


def sdxl() -> UNet2DConditionModel:
    return _unet(
        block_out_channels=(8, 16, 16),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


def pixart(num_layers: int = 3) -> PixArtTransformer2DModel:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=12,
    )
    nn.init.normal_(model.proj_out.weight, std=0.2)
    return model


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def motion(**options: Any) -> UNetMotionModel:
    """Of AnimateDiff; by default with two levels of its four."""
    two_levels = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "layers_per_block": 1,
    }
    return UNetMotionModel(
        sample_size=16,
        norm_num_groups=8,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        **(options or two_levels),
    )


def video() -> UNet3DConditionModel:
    """Of ModelScope's text-to-video, with two levels of its four."""
    return UNet3DConditionModel(
        sample_size=16,
        norm_num_groups=8,
        cross_attention_dim=16,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        attention_head_dim=4,
    )


def controlnet(**options: Any) -> ControlNetModel:
    """For `sd15`, with maps that are not zero, unlike at the beginning of a training."""
    model = ControlNetModel(
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
        **(options or {"block_out_channels": (8, 16, 16, 16)}),
    )
    for layer in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.2)
    return model


def hunyuan(text_len: int = 4, text_len_t5: int = 5) -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=text_len,
        text_len_t5=text_len_t5,
        use_style_cond_and_image_meta_size=False,
    )


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(**WAN)


def wan_image() -> WanTransformer3DModel:
    """Of Wan 2.1 for a first and a last frame, which every cross-attention sees."""
    picture = {"image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": 2 * 257}
    return WanTransformer3DModel(**{**WAN, "in_channels": 6, **picture})


def skyreels(**options: Any) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(**{**WAN, "inject_sample_info": True, **options})


def vace() -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=6)


def ddpm() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=(DOWN, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", UP),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=10,
    )


def cosmos() -> CosmosTransformer3DModel:
    """Without a mask of padding, which diffusers resizes with torchvision."""
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=8,
        max_size=(16, 32, 32),
        concat_padding_mask=False,
    )


def kandinsky() -> Kandinsky5Transformer3DModel:
    """With gates that are not zero, unlike at the beginning of a training."""
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=12,
        time_dim=16,
        out_visual_dim=4,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=True,
    )
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def ltx() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=12,
    )


def ltx2(**options: Any) -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 6,
            "audio_cross_attention_dim": 12,
            "num_layers": 2,
            "caption_channels": 12,
            "gated_attn": True,
            "audio_gated_attn": True,
            "rope_type": "split",
            **options,
        }
    )


def latte() -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=12,
        video_length=16,
    )


def svd() -> UNetSpatioTemporalConditionModel:
    """With two levels of its four."""
    return UNetSpatioTemporalConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
    )


def short_controlnet() -> ControlNetModel:
    """With two levels of its four."""
    return controlnet(
        block_out_channels=(8, 16), down_block_types=(CROSS_DOWN, DOWN), layers_per_block=1
    )


def short_ltx2() -> LTX2VideoTransformer3DModel:
    return ltx2(num_layers=1)


def two_levels() -> UNet2DConditionModel:
    """Of SD1.5, with two levels of its four."""
    return _unet(
        block_out_channels=(8, 16),
        down_block_types=(CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP),
        layers_per_block=1,
        attention_head_dim=2,
    )


@cache
def shapes_of(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose values nobody needs."""
    with torch.random.fork_rng():
        return make()


@dataclass(frozen=True)
class Case:
    """A tiny model, how many sites it has, and its preset; its family tells what it takes.

    `largest` are (height, width) of the latents that it is tried with, and `frames` theirs where it
    draws videos.
    `distils` is false of a model that predicts neither noise nor a velocity, and `flow` true of one
    that predicts a velocity. `plain` is false of one whose queries and keys are normed or turned
    before they are compared.
    """

    name: str
    make: Callable[[], nn.Module]
    sites: int
    preset: str
    square: bool = False
    largest: tuple[int, int] = (24, 40)
    frames: int = 2
    distils: bool = True
    plain: bool = True
    flow: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make().eval()

    @property
    def rank(self) -> int:
        """Of the grids of its sites."""
        return list_sites(shapes_of(self.make))[0].rank

    @property
    def joint(self) -> bool:
        """Whether text and image share an attention of it."""
        return any(site.joint is not None for site in list_sites(shapes_of(self.make)))

    def fit(self, mixer: Mixer) -> Mixer | None:
        """Settings of the same kind that fit all of its sites; None where there are none."""
        if self.rank not in mixer.build(8, 2).ranks:
            return None
        if not self.joint:
            return mixer
        if isinstance(mixer, Halo):
            return replace(mixer, key_ratio=1.0, value_ratio=1.0)
        return mixer if hasattr(mixer, "build_joint") else None

    def inputs(self, height: int, width: int, batch: int = 2) -> dict[str, Any]:
        """Keyword arguments of one call on latents of this size."""
        generator = torch.Generator().manual_seed(height * 1000 + width)
        model = shapes_of(self.make)
        size = self.latents(height, width)
        made = example_inputs(model, size, batch=batch, words=5, device="meta")

        def fill(values: Any, name: str) -> Any:
            """Values for the shapes that the model's family tells, nested as they are."""
            if isinstance(values, dict):
                return {key: fill(value, key) for key, value in values.items()}
            if isinstance(values, tuple):
                return tuple(fill(value, name) for value in values)
            if not isinstance(values, Tensor) or not values.is_meta:
                return values
            if name == family_of(model).times:
                return family_of(model).tell(300 * torch.arange(1, batch + 1)).to(values.dtype)
            if "rope_pos" in name:
                return torch.arange(len(values))
            if "mask" in name:
                return torch.ones(values.shape, dtype=values.dtype)
            if not values.is_floating_point():
                return torch.arange(batch)  # classes
            return torch.randn(values.shape, generator=generator)

        return fill(made, "")

    def told_grid(self, height: int, width: int) -> dict[str, Any]:
        """What spares a model reading its grid from where tokens lie; {} where it does not."""
        model = shapes_of(self.make)
        if not isinstance(family_of(model).carrier(model), PlacedCarrier):
            return {}
        grid = site_grid(model, list_sites(model)[0], (height, width))
        return {"joint_attention_kwargs": {"grid": torch.empty(*grid, 0)}}

    def batch(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Arguments of a `DistillTask` for two samples: latents, noise, steps and conditioning.

        All tiny models draw four channels, and some are given further ones.
        """
        family, inputs = family_of(shapes_of(self.make)), self.inputs(height, width)
        del inputs["return_dict"]
        packed, steps = inputs.pop(family.latents), 300 * torch.arange(1, 3)
        del inputs[family.times]
        sides = self.latents(height, width)
        latents = family.unpack_latents(shapes_of(self.make), packed, sides)
        noise = torch.randn(latents[:, :4].shape, generator=torch.Generator().manual_seed(2))
        return latents, noise, steps, inputs

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Two sizes with as many tokens each, one the other's transpose where that is possible."""
        return [(16, 16), (24, 24)] if self.square else [self.largest, self.largest[::-1]]

    def latents(self, height: int, width: int) -> tuple[int, ...]:
        """The sides of its latents, of a video with frames."""
        draws_videos = family_of(shapes_of(self.make)).frames
        return (self.frames, height, width) if draws_videos else (height, width)


FRAMES: dict[str, Any] = {"largest": (8, 12), "plain": False, "flow": True}

CASES = [
    Case("sd15", sd15, 16, "sd15"),
    Case("sd21", sd21, 16, "sd21"),
    Case("sdxl", sdxl, 70, "sdxl"),
    Case("pixart", pixart, 3, "pixart"),
    Case("dit", dit, 3, "dit", square=True),  # diffusers' DiT unpatchifies squares only
    Case("motion", motion, 4, "motion_unet"),
    Case("video", video, 4, "motion_unet"),
    Case("controlnet", controlnet, 7, "controlnet-sd15", distils=False),
    Case("wan", wan, 2, "wan", **FRAMES),
    Case("wan-image", wan_image, 2, "wan", **FRAMES),
    Case("skyreels", skyreels, 2, "skyreels", **FRAMES),
    Case("vace", vace, 3, "wan-vace", **FRAMES),
    Case("cosmos", cosmos, 2, "cosmos", **FRAMES),
    Case("kandinsky", kandinsky, 2, "kandinsky5", **FRAMES),
    Case("ltx", ltx, 2, "ltx", largest=(4, 6), plain=False, flow=True),
    Case("ltx2", ltx2, 2, "ltx2", largest=(4, 6), plain=False, flow=True),
    Case("latte", latte, 2, "latte", largest=(8, 12), frames=16),
    Case("svd", svd, 4, "svd_unet", largest=(8, 12)),
    Case("ddpm", ddpm, 4, "ddpm", plain=False),
    Case("hunyuan", hunyuan, 4, "hunyuandit", plain=False),
    Case("sd35", sd35, 5, "sd35-medium", plain=False, flow=True),
    Case("prx", prx, 2, "prx", plain=False, flow=True),
    Case("chroma", chroma, 3, "chroma", plain=False, flow=True),
    Case("flux", flux, 3, "flux", plain=False, flow=True),
    Case("zimage", zimage, 3, "zimage", plain=False, flow=True),
    Case("qwenimage", qwenimage, 2, "qwenimage", plain=False, flow=True),
    Case("lumina2", lumina2, 3, "lumina2", plain=False, flow=True),
]
FLAT = [case for case in CASES if case.rank == 2]
VIDEOS = [case for case in CASES if case.rank == 3]
DISTILLED = [case for case in CASES if case.distils]
PLAIN = [case for case in DISTILLED if case.plain]
JOINT = [case for case in CASES if case.joint]
APART = [case for case in CASES if not case.joint]


def run(model: nn.Module, case: Case, height: int, width: int, batch: int = 2) -> Tensor:
    """What a model makes of its latents; see `first_output`."""
    return first_output(model(**case.inputs(height, width, batch)))


def first_output(outputs: Any) -> Tensor:
    """What a call of a model gives that is compared; of a ControlNet, all of its maps."""
    if isinstance(outputs, Tensor):  # as Kandinsky 5 gives it
        return outputs
    output, *others = outputs
    if isinstance(output, Tensor):
        return output
    if not others:  # of each sample by itself
        return torch.stack(list(output))
    return torch.cat([each.flatten(1) for each in (*output, *others)], dim=1)


def run_video(model: nn.Module, frames: int, height: int, width: int) -> Tensor:
    """What a model makes of two made-up videos, whose latents have these sides."""
    return model(**example_inputs(model, (frames, height, width), batch=2, words=5))[0]


def randomise(mixers: dict[str, nn.Module], std: float = 0.3) -> None:
    """Give every parameter of every mixer a value that matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for mixer in mixers.values():
            for parameter in mixer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
