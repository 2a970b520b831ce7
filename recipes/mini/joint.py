"""The sixth mini model: a `StableDiffusion3Pipeline`, whose text and image share each attention.

64×64 pixels, 16×16 tokens of one latent pixel each, in six joint blocks of width 128; pictures,
captions and autoencoder are the embedded model's. Its text is read by the embedded model's CLIP
and by a second, narrow one. There is no T5: the pipeline adds 256 tokens of zeros in its place, as
it does for Stable Diffusion 3. What `joint_teacher.py` trained lies in `joint/` beside this file,
in float16; `python joint.py build FOLDER` puts it together with the rest for `DiffusionPipeline`,
`convfusion analyze FOLDER` and the other commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from convfusion import mini
from convfusion.checkpoint.pipelines import in_dtype
from convfusion.data import LatentDataset
from convfusion.families import encode_conditioning

KEPT = Path(__file__).parent / "joint"
SIZE = 64  # pixels
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # which `from_pretrained` must be told
GUIDANCE, STEPS = 3.0, 25  # that pictures are drawn with
NOISES = 4  # that the error of each picture is measured at


def load_joint(folder: Path = KEPT) -> StableDiffusion3Pipeline:
    """A trained pipeline, on the CPU in float32: the kept one, or that of another folder."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder,
        **embedded_parts(),
        **in_dtype(torch.float32),
        local_files_only=True,
        use_safetensors=True,
    )
    pipe.transformer.eval()
    return pipe


def embedded_parts() -> dict[str, Any]:
    """What the pipeline takes from the embedded model, by its name there."""
    teacher = mini.load_teacher()
    return {
        "vae": with_shift(teacher.vae),
        "text_encoder": with_projection(teacher.text_encoder),
        "tokenizer": teacher.tokenizer,
        "tokenizer_2": teacher.tokenizer,
        **NO_T5,
    }


def with_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder itself; its latents are shifted by 0, which the pipeline wants to be told."""
    vae.register_to_config(shift_factor=0.0)
    return vae


def with_projection(text_encoder: Any) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with the projection that the pipeline asks for, which changes nothing."""
    width = text_encoder.config.hidden_size
    config = CLIPTextConfig(**text_encoder.config.to_dict() | {"projection_dim": width})
    model = CLIPTextModelWithProjection(config).eval()
    own = text_encoder.state_dict()
    # Where transformers 5.6 nests the encoder once more, both are nested alike.
    prefix = "" if any(name.startswith("text_model.") for name in own) else "text_model."
    weights = {prefix + name: tensor for name, tensor in own.items()}
    model.load_state_dict(weights | {"text_projection.weight": torch.eye(width)})
    return model


def noise_shares(uniform: torch.Tensor) -> torch.Tensor:
    """σ of even numbers in (0, 1): the share of noise, logit-normal as Stable Diffusion 3's."""
    return torch.special.ndtri(uniform).sigmoid()


@torch.no_grad()
def measure(pipe: StableDiffusion3Pipeline, data: LatentDataset) -> dict[str, float]:
    """How far the velocity v = ε − x is off, by noises and σ that are always the same.

    Returns:
        `loss`, the mean of ‖v̂ − v‖²/n over logit-normal σ, which is the training's; and `relative`,
        the same divided by that of predicting zero.
    """
    generator = torch.Generator().manual_seed(0)
    error = zero = 0.0
    for first in range(0, len(data), 16):
        latents = data.latents[first : first + 16]
        told = encode_conditioning(pipe, data.captions[first : first + 16], (SIZE, SIZE))
        for _ in range(NOISES):
            noise = torch.randn(latents.shape, generator=generator)
            share = noise_shares(torch.rand(len(latents), 1, 1, 1, generator=generator))
            noisy = (1 - share) * latents + share * noise
            found = pipe.transformer(
                noisy, timestep=1000 * share.flatten(), return_dict=False, **told
            )[0]
            error += float((found - (noise - latents)).square().mean()) * len(latents)
            zero += float((noise - latents).square().mean()) * len(latents)
    return {"loss": round(error / len(data) / NOISES, 4), "relative": round(error / zero, 4)}


def read_facts() -> dict[str, Any]:
    """What is noted of the training, and what was measured of its result."""
    return json.loads((KEPT / "joint.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    load_joint().save_pretrained(folder)


if __name__ == "__main__":
    main()
