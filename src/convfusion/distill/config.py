"""What decides a distillation, as plain frozen data that round-trips through JSON and TOML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from convfusion.errors import ConvFusionError
from convfusion.settings import check_fields, check_names

Start = Literal["converted", "attention"]
Optimizer = Literal["adamw", "adamw8bit"]
Autocast = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class LossWeights:
    """L = distill·w‖ε̃−ε̂‖² + noise·w‖ε−ε̂‖² + feature·L_f, with Min-SNR weights w of γ.

    Attributes:
        distill: weight of w(t)·‖ε̃ − ε̂‖², student against teacher.
        noise: weight of w(t)·‖ε − ε̂‖², student against the true noise; it pulls towards the data
            and away from the teacher.
        feature: weight β of L_f, the hidden states after each site.
        snr_gamma: not a weight but γ of Min-SNR.
    """

    distill: float = 1.0
    noise: float = 0.0
    feature: float = 1e-3
    snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.snr_gamma <= 0:
            raise ConvFusionError(f"snr_gamma must be positive, not {self.snr_gamma}")
        weights = (self.distill, self.noise, self.feature)
        if min(weights) < 0 or not any(weights):
            raise ConvFusionError("loss weights must not be negative, nor all of them 0")


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides what a distillation does to the blocks.

    The defaults are this project's recipe; `DistillConfig.paper()` is the paper's.

    Attributes:
        steps: optimiser steps in all.
        imitation_steps: the first of them, in which each block learns alone to imitate its
            attention on the teacher's own inputs; the others train all blocks end to end.
        start: `attention`, each block that was never trained is first set to the measured mean of
            the attention it replaces; or `converted`, all blocks begin as they are.
        batch_size: samples per step, over all processes and accumulated parts.
        accumulation: parts that each process works its share of a batch in.
        optimizer: `adamw`, or `adamw8bit` of bitsandbytes.
        learning_rate: after `warmup` steps.
        warmup: steps over which the rate rises from 0; -1 takes a twentieth of `steps`, and 100 at
            the most.
        decay: share of the steps, at the end, over which the rate falls to 0 along a cosine.
        betas: of AdamW.
        weight_decay: of the optimiser.
        clip_norm: largest norm of the gradient over all blocks.
        ema: decay of a moving average of the blocks, which is what is drawn with and saved in the
            end; 0 keeps none.
        caption_drop: share of captions replaced by '', for classifier-free guidance.
        autocast: `no`, `bf16` or `fp16`. The blocks train in float32.
        checkpointing: recompute activations in the backward pass.
        losses: weights of the terms.
        held_out: samples kept out of training, on which the ε-error is measured.
        workers: processes that read the data ahead.
        save_every: steps between checkpoints, of which the last two are kept.
        validate_every: steps between validations (pictures and ε-error); 0 does one, at the end.
        log_every: steps between logged losses.
        tracker: `auto` is TensorBoard where it is installed; a tracker that accelerate knows, such
            as `wandb`; or `none`. The losses are in `losses.jsonl` in any case.
        max_skipped: steps in a row that may be skipped for a loss or gradient that is not finite.
        seed: of batches, noise, timesteps and dropped captions; a step's draws depend on it and
            the step alone.
    """

    steps: int = 1000
    imitation_steps: int = 0
    start: Start = "attention"
    batch_size: int = 16
    accumulation: int = 1
    optimizer: Optimizer = "adamw"
    learning_rate: float = 5e-4
    warmup: int = -1
    decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.0
    caption_drop: float = 0.15
    autocast: Autocast = "no"
    checkpointing: bool = False
    losses: LossWeights = field(default_factory=LossWeights)
    held_out: int = 0
    workers: int = 0
    save_every: int = 500
    validate_every: int = 0
    log_every: int = 10
    tracker: str = "auto"
    max_skipped: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "accumulation", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConvFusionError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("weight_decay", "held_out", "workers", "validate_every"):
            if getattr(self, name) < 0:
                raise ConvFusionError(f"{name} must not be negative")
        if not 0 <= self.imitation_steps <= self.steps:
            raise ConvFusionError(
                f"imitation_steps must lie between 0 and steps: it is {self.imitation_steps}, and "
                f"there are {self.steps} steps: lower it too"
            )
        self._check_warmup()
        if self.batch_size % self.accumulation:
            raise ConvFusionError(
                f"batch_size {self.batch_size} is not a multiple of accumulation "
                f"{self.accumulation}"
            )
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ConvFusionError("learning_rate and clip_norm must be positive")
        if not 0 <= self.caption_drop <= 1 or not 0 <= self.decay <= 1:
            raise ConvFusionError("caption_drop and decay must lie between 0 and 1")
        if not (0 <= self.ema < 1 and all(0 <= beta < 1 for beta in self.betas)):
            raise ConvFusionError("ema and betas must lie between 0 and 1, and below 1")
        if not 0 <= self.seed < 2**63:
            raise ConvFusionError(f"seed must lie between 0 and 2^63 − 1, not {self.seed}")
        if self.max_skipped < 1:
            raise ConvFusionError("max_skipped must be at least 1")

    def _check_warmup(self) -> None:
        if self.warmup < -1:
            raise ConvFusionError(
                f"warmup is a number of steps, or -1 for one that fits the run, not {self.warmup}"
            )
        if self.warmup > self.steps:
            raise ConvFusionError(
                f"a warmup of {self.warmup} steps is longer than the run, which has {self.steps}: "
                f"lower warmup, or set it to -1, which here takes {fitting_warmup(self.steps)}"
            )

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step, counted from 0."""
        warmup = fitting_warmup(self.steps) if self.warmup < 0 else self.warmup
        rising = min(1.0, (step + 1) / max(1, warmup))
        tail, left = self.decay * self.steps, self.steps - step
        falling = 0.5 - 0.5 * math.cos(math.pi * left / tail) if left < tail else 1.0
        return rising * falling

    @classmethod
    def paper(cls, **changes: Any) -> DistillConfig:
        """The paper's recipe, as it distilled Stable Diffusion 1.5, with some fields changed.

        Args:
            changes: fields of `DistillConfig`; a shorter run needs a shorter `warmup`.

        Raises:
            ConvFusionError: as for any `DistillConfig`.
        """
        return cls(**{**PAPER, **changes})

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """From what `to_dict` gives; fields left out take their defaults.

        Raises:
            ConvFusionError: a field is unknown, or a value is of the wrong kind or out of range.
        """
        settings = dict(values)
        check_names(cls, settings, "a distillation")
        if "losses" in settings:
            if not isinstance(settings["losses"], Mapping):
                raise ConvFusionError("`losses` must be a table of weights")
            check_names(LossWeights, settings["losses"], "`losses`")
            settings["losses"] = LossWeights(**settings["losses"])
        if isinstance(settings.get("betas"), list):
            settings["betas"] = tuple(settings["betas"])
        return cls(**settings)


def fitting_warmup(steps: int) -> int:
    """The warm-up of a run that names none: a twentieth of its steps, at most 100."""
    return min(100, steps // 20)


PAPER: Mapping[str, Any] = {
    "steps": 60_000,
    "imitation_steps": 0,
    "start": "converted",
    "batch_size": 16,
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "warmup": 500,
    "decay": 0.0,
    "betas": (0.9, 0.99),
    "weight_decay": 0.01,
    "ema": 0.0,
    "caption_drop": 0.15,
    "losses": LossWeights(distill=1.0, noise=1.0, feature=1e-3, snr_gamma=5.0),
}
