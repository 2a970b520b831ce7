"""The losses of the distillation, as pure functions of tensors.

L = L_z + β·L_f, with teacher output ε̃, student output ε̂ and true noise ε:

    L_z = w(t)·(‖ε̃ − ε̂‖² + ‖ε − ε̂‖²)          w(t) = min(SNR, γ)/SNR  (Min-SNR, Hang et al. 2023)
    L_f = Σ_l ‖h_l(student) − h_l(teacher)‖²     hidden states right after each site

Of a flow, velocities v take the place of ε, with w = 1: that is the loss that flow models train
with (Lipman et al. 2022; Esser et al. 2024), and an error in v at any time moves the picture by as
much for each bit of the way. Their training draws the times in the middle more often, to learn the
data; a student copies its teacher, so the times are those that pictures are drawn at.

Every norm is a mean over elements, so that sizes compare.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convfusion.schedule import Schedule


def weigh_steps(schedule: Schedule, steps: Tensor, gamma: float) -> Tensor:
    """w of an error at steps [B]: Min-SNR's, or 1 of a flow; [B] float32."""
    if schedule.is_flow:
        return torch.ones(steps.shape, device=steps.device)
    return min_snr_weight(schedule.levels, steps, gamma)


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
