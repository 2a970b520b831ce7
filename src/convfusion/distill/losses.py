"""The losses of the distillation, as pure functions of tensors.

L = L_z + β·L_f, with teacher output ε̃, student output ε̂ and true noise ε:

    L_z = w(t)·(‖ε̃ − ε̂‖² + ‖ε − ε̂‖²)          w(t) = min(SNR, γ)/SNR  (Min-SNR, Hang et al. 2023)
    L_f = Σ_l ‖h_l(student) − h_l(teacher)‖²     hidden states right after each site

Every norm is a mean over elements, so that sizes compare.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def min_snr_weight(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, γ)/SNR for an error in ε at timesteps [B], with SNR = ᾱ/(1 − ᾱ); [B] float32."""
    signal = alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = signal / (1 - signal)
    return (gamma / snr.clamp(min=1e-20)).clamp(max=1)  # 1 where there is no signal at all


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of w_b·mean((prediction_b − target_b)²), for weights [B]; a scalar."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (weight * error).mean()


def feature_losses(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean squared difference of the hidden states [B, N, C] of each site; L_f is their sum."""
    return {
        name: (student[name].float() - teacher[name].float()).square().mean() for name in teacher
    }
