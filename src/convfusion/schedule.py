"""The forward process: latents with noise, and what a denoiser's output stands for.

Two kinds of process are known. A diffusion mixes clean latents x and noise ε by ᾱ, and its output
is read as the noise; a flow lies on the straight line between them, and its output is the velocity
along that line:

    diffusion   x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε         ε = √ᾱ·v + √(1 − ᾱ)·x_t of a v-prediction
    flow        x_t = (1 − σ_t)·x + σ_t·ε           v = dx_t/dσ = ε − x
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convfusion.errors import ConvFusionError

if TYPE_CHECKING:
    from convfusion.families import Denoiser

FLOW = "flow_prediction"
DIFFUSIONS = ("epsilon", "v_prediction")
KARRAS = 7  # ρ of the noise levels of EDM


@dataclass(frozen=True)
class Schedule:
    """How much noise latents have at each of T steps, and what the denoiser predicts.

    Steps are integers in [0, T), from little noise to much. Those of a diffusion are its timesteps,
    but of one with continuous times, see `continuous_schedule`.
    Those of a flow are spread over the times that its scheduler draws with, see `noise_schedule`.

    Attributes:
        prediction: `epsilon`, `v_prediction` or `flow_prediction`.
        levels: ᾱ of a diffusion or σ of a flow, [T].
        timesteps: what the denoiser is told at each step, [T]: integers, or real numbers of a flow
            or of continuous times.
    """

    prediction: str
    levels: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def is_flow(self) -> bool:
        return self.prediction == FLOW

    def is_same(self, other: Schedule) -> bool:
        """Whether two schedules are equal, number for number."""
        return self.prediction == other.prediction and all(
            torch.equal(one.cpu(), two.cpu())
            for one, two in ((self.levels, other.levels), (self.timesteps, other.timesteps))
        )

    def tell(self, steps: Tensor) -> Tensor:
        """The timesteps that a denoiser is told at steps [B]; [B]."""
        return self.timesteps.to(steps.device)[steps]

    def add_noise(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t of latents [B, C, H, W] or [B, C, T, H, W] and noise of that shape at steps [B].

        Noise of fewer channels is added to the first ones. Those behind them, of a picture or mask
        to go by, stay as they are.
        """
        latents, given = latents.tensor_split([noise.shape[1]], dim=1)
        level = self._level(latents, steps)
        if self.is_flow:
            noisy = (1 - level) * latents + level * noise
        else:
            noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        return torch.cat([noisy, given], dim=1) if given.shape[1] else noisy

    def read_output(self, output: Tensor, noisy: Tensor, steps: Tensor) -> Tensor:
        """What a denoiser's output stands for: the noise, or of a flow the velocity.

        A learned variance (twice as many channels as the latents) is dropped.

        Args:
            output: of the denoiser.
            noisy: the latents x_t that it was given, with further channels as for `add_noise`.
            steps: [B].

        Returns:
            As the noise, in float32.
        """
        noisy = noisy[:, : output.shape[1]]
        output = output[:, : noisy.shape[1]].float()
        if self.prediction != "v_prediction":
            return output
        level = self._level(noisy, steps).float()
        return level.sqrt() * output + (1 - level).sqrt() * noisy.float()

    def find_target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What a perfect denoiser's output would stand for: ε, or of a flow ε − x."""
        return noise - latents[:, : noise.shape[1]] if self.is_flow else noise

    def _level(self, like: Tensor, steps: Tensor) -> Tensor:
        """Levels at steps [B], with as many dimensions as latents."""
        return self.levels.to(like.device)[steps].view(-1, *[1] * (like.dim() - 1))


def noise_schedule(scheduler: Any, denoiser: Denoiser) -> Schedule:
    """The schedule that a diffusers scheduler stands for.

    A flow's steps are the times u = 1/T, 2/T, … 1, moved as the scheduler moves them when it draws:
    σ = s·u/(1 + (s − 1)·u) for its shift s. A dynamic shift follows from the number of tokens, and
    is that of the denoiser's own size. It only decides how the steps are spread: the velocity at
    a given σ does not depend on it.

    Args:
        scheduler: a discrete one, such as DDIM; `FlowMatchEulerDiscreteScheduler` and its like; or
            a solver in its flow mode (`prediction_type="flow_prediction"`, `use_flow_sigmas=True`),
            such as UniPC's and DPM++'s.
        denoiser: that it is drawn with.

    Raises:
        ConvFusionError: it is none of these, or its flow runs the other way.
    """
    config = scheduler.config
    if is_flow(scheduler):
        sigmas = flow_sigmas(scheduler, denoiser)
        return Schedule(FLOW, sigmas, sigmas * config.num_train_timesteps)
    kind = config.get("prediction_type")
    if config.get("timestep_type") == "continuous" and config.get("sigma_max") is not None:
        if kind != "v_prediction":
            raise ConvFusionError(
                f"continuous times with prediction type {kind!r} are not supported"
            )
        return continuous_schedule(config)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if kind not in DIFFUSIONS or alphas_cumprod is None:
        raise ConvFusionError(
            f"{type(scheduler).__name__} with prediction type {kind!r} is not supported: it needs "
            "a discrete noise schedule (alphas_cumprod) with epsilon or v_prediction, or a flow "
            "(FlowMatchEulerDiscreteScheduler, or flow_prediction with use_flow_sigmas)"
        )
    return Schedule(kind, alphas_cumprod, torch.arange(len(alphas_cumprod)))


def continuous_schedule(config: Any) -> Schedule:
    """Steps of a model that is told the logarithm of its noise, such as Stable Video Diffusion.

    With noise of deviation σ added to clean latents, it is given (x + σ·ε)/√(1 + σ²), which is x_t
    of ᾱ = 1/(1 + σ²), and told ¼·ln σ (EDM, Karras et al. 2022). The steps are spread as the
    scheduler draws: evenly in σ^(1/7).
    """
    least, most = (config[name] ** (1 / KARRAS) for name in ("sigma_min", "sigma_max"))
    sigmas = torch.linspace(least, most, config.num_train_timesteps) ** KARRAS
    return Schedule("v_prediction", 1 / (1 + sigmas.square()), 0.25 * sigmas.log())


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler draws along a flow."""
    config = scheduler.config
    if "prediction_type" in config:
        return config["prediction_type"] == FLOW and bool(config.get("use_flow_sigmas"))
    return "shift" in config and "FlowMatch" in type(scheduler).__name__


def flow_sigmas(scheduler: Any, denoiser: Denoiser) -> Tensor:
    """σ [T] of a flow's steps, rising to 1; see `noise_schedule`.

    Raises:
        ConvFusionError: its noise is at σ = 0.
    """
    config = scheduler.config
    if config.get("invert_sigmas"):
        raise ConvFusionError(
            f"{type(scheduler).__name__} with invert_sigmas is not supported: its flow runs from "
            "noise at 0 to pictures at 1"
        )
    count = config.num_train_timesteps
    times = torch.arange(1, count + 1) / count
    if config.get("use_dynamic_shifting"):
        moved = dynamic_shift(config, denoiser)
        if config.get("time_shift_type", "exponential") == "exponential":
            moved = math.exp(moved)
    else:
        # A pipeline may have set another shift than the one of the config.
        moved = getattr(scheduler, "shift", config.get("flow_shift", 1.0))
    sigmas = moved * times / (1 + (moved - 1) * times)
    if terminal := config.get("shift_terminal"):
        # Drawing ends there, so that nothing below is ever asked for (LTX).
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[0])
    return sigmas


def dynamic_shift(config: Any, denoiser: Denoiser) -> float:
    """μ of a scheduler with `use_dynamic_shifting`: linear in the tokens of the denoiser's size.

    The defaults are those of diffusers' pipelines.
    """
    from convfusion.families import list_sites, native_latents, site_grid

    tokens = math.prod(site_grid(denoiser, list_sites(denoiser)[0], native_latents(denoiser)))
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return least + (largest - least) * (tokens - fewest) / (most - fewest)
