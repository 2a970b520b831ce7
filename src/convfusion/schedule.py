"""The forward process: latents with noise, and the noise that a denoiser's output stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convfusion.errors import ConvFusionError

PREDICTIONS = ("epsilon", "v_prediction")


def noise_schedule(scheduler: Any) -> tuple[Tensor, str]:
    """ᾱ [T] of a diffusers scheduler, and what its denoiser predicts.

    Raises:
        ConvFusionError: it has no discrete noise schedule, or another kind of prediction.
    """
    kind = getattr(scheduler.config, "prediction_type", None)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if kind not in PREDICTIONS or alphas_cumprod is None:
        raise ConvFusionError(
            f"{type(scheduler).__name__} with prediction type {kind!r} is not supported: a "
            f"discrete noise schedule (alphas_cumprod) and {' or '.join(PREDICTIONS)} are needed"
        )
    return alphas_cumprod, kind


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε, [B, C, H, W] or [B, C, T, H, W], for integer timesteps [B]."""
    signal = alphas_cumprod.to(latents.device)[timesteps].view(-1, *[1] * (latents.dim() - 1))
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def as_epsilon(
    output: Tensor, noisy: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """The noise that a denoiser's output stands for, as the latents in float32.

    A learned variance (twice as many channels as the latents) is dropped. A v-prediction is
    turned by ε = √ᾱ·v + √(1−ᾱ)·x_t.

    Raises:
        ConvFusionError: the prediction type is neither `epsilon` nor `v_prediction`.
    """
    output = output[:, : noisy.shape[1]].float()
    if prediction_type == "epsilon":
        return output
    if prediction_type != "v_prediction":
        raise ConvFusionError(
            f"prediction type {prediction_type!r} is not supported: epsilon or v_prediction"
        )
    signal = alphas_cumprod.to(timesteps.device)[timesteps].float()
    signal = signal.view(-1, *[1] * (noisy.dim() - 1))
    return signal.sqrt() * output + (1 - signal).sqrt() * noisy.float()
