"""Tiny random pipelines, one per family, for what needs more than a denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    LattePipeline,
    LTXPipeline,
    Lumina2Pipeline,
    MotionAdapter,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    SD3Transformer2DModel,
    SkyReelsV2Pipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
)
from tiny_joint import chroma, flux, lumina2, qwenimage, zimage
from tiny_models import dit, hunyuan, latte, ltx, pixart, sdxl, skyreels, video
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from convfusion import mini
from convfusion.surgery import mixers_of


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(mini.TEACHER / "tokenizer")


def text_config(width: int) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )


def autoencoder(levels: int = 2) -> AutoencoderKL:
    """Two pixels per latent along a side, and twice as many for each further level."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).eval()


def stable_diffusion() -> StableDiffusionPipeline:
    """For 16×16 pictures, with sites on 8×8 and 4×4 tokens."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(16)).eval(),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    torch.manual_seed(3)
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(8)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(8)).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=sdxl().eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        add_watermarker=False,
    )


def word_tokenizer() -> T5Tokenizer:
    """Of three words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -1.0) for piece in ("▁red", "▁green", "▁apple")]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def text_encoder(width: int = 12) -> T5EncoderModel:
    """Of the words of `word_tokenizer`."""
    config = T5Config(
        vocab_size=8,
        d_model=width,
        d_kv=6,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def pixart_sigma() -> PixArtSigmaPipeline:
    torch.manual_seed(3)
    return PixArtSigmaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        transformer=pixart().eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def dit_pipeline() -> DiTPipeline:
    torch.manual_seed(3)
    return DiTPipeline(
        transformer=dit().eval(),
        vae=autoencoder(),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label={0: "red", 1: "green", 2: "apple"},
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Of SD3.5 Medium, without its third text encoder, which one may leave out."""
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = autoencoder()
    vae.register_to_config(shift_factor=0.1)  # which its pipelines ask for
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(8)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(8)).eval(),
        text_encoder_3=None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=None,
    )


def flux_dev() -> FluxPipeline:
    """For pictures with a token for each 4×4 pixels."""
    torch.manual_seed(3)
    vae = autoencoder()
    vae.register_to_config(shift_factor=0.1)  # which its pipelines ask for
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(text_config(8)).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(),
        tokenizer_2=word_tokenizer(),
        transformer=flux().eval(),
    )


def flux_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**flux_dev().components)


def chroma_pipeline() -> ChromaPipeline:
    parts = flux_dev().components
    torch.manual_seed(3)
    return ChromaPipeline(
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        text_encoder=parts["text_encoder_2"],
        tokenizer=parts["tokenizer_2"],
        transformer=chroma().eval(),
    )


# Of text encoders that are language models, for the words of `word_tokenizer`.
READER = {
    "vocab_size": 8,
    "hidden_size": 12,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def z_image() -> ZImagePipeline:
    """For pictures with a token for each 4×4 pixels; it reads a prompt as it is."""
    torch.manual_seed(3)
    vae, words = autoencoder(), word_tokenizer()
    vae.register_to_config(shift_factor=0.1)  # which its pipelines ask for
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**READER)).eval(),
        tokenizer=words,
        transformer=zimage().eval(),
    )


def lumina_image() -> Lumina2Pipeline:
    """For pictures with a token for each 16×16 pixels, as its pipelines insist."""
    torch.manual_seed(3)
    vae = autoencoder(levels=4)
    vae.register_to_config(shift_factor=0.1)
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=Gemma2Model(Gemma2Config(**READER)).eval(),
        tokenizer=word_tokenizer(),
        transformer=lumina2().eval(),
    )


def qwen_image() -> QwenImagePipeline:
    """For pictures with a token for each 4×4 pixels; it reads a prompt as it is."""
    torch.manual_seed(3)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=Qwen3Model(Qwen3Config(**READER)).eval(),
        tokenizer=word_tokenizer(),
        transformer=qwenimage().eval(),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


def wan() -> WanPipeline:
    """For videos, 4× smaller per side and in time: 5 frames of 16×16 have 2×2×2 tokens."""
    torch.manual_seed(3)
    text = UMT5Config(
        vocab_size=8,
        d_model=12,
        d_kv=6,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def ltx_video_8x() -> LTXPipeline:
    """For videos, 8× smaller per side and 2× in time: 5 frames of 32×64 have 3×4×8 tokens."""
    torch.manual_seed(3)
    text = T5Config(
        vocab_size=8,
        d_model=12,
        d_kv=6,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTXVideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("conv",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )
    return LTXPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=T5EncoderModel(text).eval(),
        vae=vae.eval(),
        transformer=ltx().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def skyreels_v2() -> SkyReelsV2Pipeline:
    """As `wan`, of the same parts but the transformer."""
    other = wan()
    torch.manual_seed(3)
    parts = {**other.components, "transformer": skyreels(text_dim=12, inject_sample_info=False)}
    del parts["transformer_2"]
    return SkyReelsV2Pipeline(**parts)


def ltx_video() -> LTXPipeline:
    """8× smaller in time and 32× per side, as the published one: 9 frames of 64×96 are 2×2×3."""
    torch.manual_seed(3)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.5, 1.0, 2.0]))
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        vae=vae.eval(),
        text_encoder=text_encoder(),
        tokenizer=word_tokenizer(),
        transformer=ltx().eval(),
    )


def latte_pipeline() -> LattePipeline:
    """For clips of 16 frames, each encoded by itself."""
    torch.manual_seed(3)
    return LattePipeline(
        tokenizer=word_tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        transformer=latte().eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def animate_diff() -> AnimateDiffPipeline:
    stock = stable_diffusion()
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    return AnimateDiffPipeline(
        vae=stock.vae,
        text_encoder=stock.text_encoder,
        tokenizer=stock.tokenizer,
        unet=stock.unet,
        motion_adapter=adapter.eval(),
        scheduler=stock.scheduler,
    )


def text_to_video() -> TextToVideoSDPipeline:
    """Of ModelScope."""
    stock = stable_diffusion()
    return TextToVideoSDPipeline(
        vae=stock.vae,
        text_encoder=stock.text_encoder,
        tokenizer=stock.tokenizer,
        unet=video().eval(),
        scheduler=stock.scheduler,
    )


def hunyuan_dit(folder: Path) -> HunyuanDiTPipeline:
    """Args: folder: for the words of its first text encoder."""
    torch.manual_seed(3)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "apple"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return HunyuanDiTPipeline(
        vae=autoencoder(levels=4),  # which its pipelines rely on
        text_encoder=BertModel(text).eval(),
        tokenizer=BertTokenizer(str(folder / "vocab.txt")),
        text_encoder_2=text_encoder(16),
        tokenizer_2=word_tokenizer(),
        transformer=hunyuan(77, 256).eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart": pixart_sigma,
    "dit": dit_pipeline,
}


def block_weights(pipe) -> dict[str, torch.Tensor]:
    """A copy of every tensor of every block."""
    return {
        f"{path}.{name}": tensor.clone()
        for path, mixer in mixers_of(pipe).items()
        for name, tensor in mixer.state_dict().items()
    }
