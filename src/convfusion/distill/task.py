"""Teacher and student in one copy of the frozen weights, and the losses between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from convfusion.distill.config import LossWeights
from convfusion.distill.losses import feature_losses, weigh_steps, weighted_mse
from convfusion.families import (
    Denoiser,
    Site,
    arrange_call,
    call_denoiser,
    family_of,
    list_sites,
)
from convfusion.families.watch import watch_tokens
from convfusion.mixers.base import read_added
from convfusion.mixers.joint import attend_from_image
from convfusion.mixers.tokens import TokenSample
from convfusion.schedule import Schedule, noise_schedule
from convfusion.surgery import attention_teacher, mixers_of


class Losses(NamedTuple):
    """What a batch costs.

    Attributes:
        terms: the weighted terms, each a scalar; their sum is what to minimise.
        sites: error of each site by itself, without gradient: its term of L_f before weighting, or
            of the imitation.
    """

    terms: dict[str, Tensor]
    sites: dict[str, Tensor]


@contextmanager
def collected(
    modules: Mapping[str, nn.Module], what: Literal["input", "output"]
) -> Iterator[dict[str, Tensor]]:
    """Collect the first input, or the output, of modules while the block runs, in their order.

    What is replayed later (gradient checkpointing, in backward) is not collected again.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor | None = None) -> None:
            inputs[name] = args[0] if output is None else output

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name))
        if what == "input"
        else module.register_forward_hook(keep(name))
        for name, module in modules.items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(model: Denoiser, sites: Sequence[Site]) -> Any:
    """Collect the hidden state [B, N, C] right after each site while the block runs."""
    return collected({site.path: model.get_submodule(site.tap) for site in sites}, "input")


class DistillTask(nn.Module):
    """Named losses of a student against its own attention.

    A module whose parameters are the student's, so that it can be wrapped for several processes;
    the teacher shares them and is not registered.

    Args:
        student: a converted denoiser with its attention kept.
        scheduler: the pipeline's, of which only its noise schedule and prediction type are read; or
            a `Schedule`, for a model whose scheduler says it in a way of its own.
        weights: of the terms. A term of weight 0 is not computed.

    Raises:
        ConvFusionError: the denoiser predicts neither noise nor a velocity; or its schedule is not
            known.
    """

    def __init__(
        self, student: Denoiser, scheduler: Any, weights: LossWeights = LossWeights()
    ) -> None:
        super().__init__()
        family_of(student).check_distill(student)
        self.student = student
        self._unregistered = (attention_teacher(student),)
        self.weights = weights
        given = isinstance(scheduler, Schedule)
        self.schedule = scheduler if given else noise_schedule(scheduler, student)
        self.sites = [site for site in list_sites(student) if site.path in mixers_of(student)]

    @property
    def teacher(self) -> Denoiser:
        return self._unregistered[0]

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Any],
        *,
        alone: bool = False,
    ) -> Losses:
        """The terms of `imitation` (each block alone), or of `losses` (end to end).

        Args:
            latents: clean and scaled, [B, C, h, w] or [B, C, t, h, w], whatever layout the denoiser
                takes them in. A picture or mask that it goes by is among the channels, behind what
                it draws.
            noise: as the latents, of the channels that are drawn.
            timesteps: [B], integers: steps of the schedule.
            conditioning: further keyword arguments of the denoiser.
            alone: choose `imitation`.
        """
        measure = self.imitation if alone else self.losses
        return measure(latents, noise, timesteps, conditioning)

    def losses(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Any]
    ) -> Losses:
        """The weighted terms of L; arguments as for `forward`."""
        noisy = self._noisy(latents, noise, timesteps)
        with torch.no_grad(), hidden_states(self.teacher, self.sites) as taught:
            target = self._predict(self.teacher, noisy, timesteps, conditioning)
        with hidden_states(self.student, self.sites) as learned:
            output = self._predict(self.student, noisy, timesteps, conditioning)
        weights = self.weights
        weight = weigh_steps(self.schedule, timesteps, weights.snr_gamma)
        terms: dict[str, Tensor] = {}
        sites: dict[str, Tensor] = {}
        if weights.distill:
            terms["distill"] = weights.distill * weighted_mse(output, target, weight)
        if weights.noise:
            truth = self.schedule.find_target(latents, noise)
            terms["noise"] = weights.noise * weighted_mse(output, truth, weight)
        if weights.feature:
            features = feature_losses(learned, taught)
            terms["feature"] = weights.feature * torch.stack(list(features.values())).sum()
            sites = {path: error.detach() for path, error in features.items()}
        return Losses(terms, sites)

    def imitation(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Any]
    ) -> Losses:
        """Each block alone on the teacher's own inputs: ‖b(x) − a(x)‖²/Var a(x).

        The variance is over tokens and channels of one sample, so that a batch in parts has the
        loss of the whole; the mean is over samples and sites. Arguments as for `forward`.
        """
        errors = {}
        for path, (learned, taught) in self.alone(latents, noise, timesteps, conditioning).items():
            error = (learned - taught).square().flatten(1).mean(dim=1)
            errors[path] = (error / taught.flatten(1).var(dim=1).clamp(min=1e-12)).mean()
        mean = torch.stack(list(errors.values())).mean()
        return Losses({"imitation": mean}, {path: e.detach() for path, e in errors.items()})

    def alone(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What each block b(x) and its attention a(x) make of the same input, [B, N, C] float32.

        Where text and image share the attention, it is what the image's tokens gather.

        The attention a and its input x come from one pass of the teacher, so that no block meets
        another's errors. Arguments as for `forward`.
        """
        inputs: dict[str, TokenSample] = {}

        def see(site: Site, attention: Any, seen: TokenSample) -> None:
            inputs[site.path] = seen

        noisy = self._noisy(latents, noise, timesteps)
        told = self.schedule.tell(timesteps)
        with torch.no_grad(), watch_tokens(self.teacher, see), self._attended() as outputs:
            self.teacher(**arrange_call(self.teacher, noisy, told, conditioning))
        compared = {}
        for path, mixer in mixers_of(self.student).items():
            seen = inputs[path]
            taught = outputs[path] if seen.joint is None else attend_from_image(seen.joint)
            compared[path] = (mixer(seen.inputs, seen.grid).float(), taught.float())
        return compared

    @contextmanager
    def _attended(self) -> Iterator[dict[str, Tensor]]:
        """Collect what the attention of each site gives, [B, N, C], while the block runs."""
        outputs: dict[str, Tensor] = {}

        def keep(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                maps = output.ndim == 4
                outputs[path] = read_added(module, args[0], output) if maps else output

            return hook

        alone = [site.path for site in self.sites if site.joint is None]
        attentions = {path: self.teacher.get_submodule(path) for path in alone}
        handles = [module.register_forward_hook(keep(p)) for p, module in attentions.items()]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, timesteps).to(self.student.dtype)

    def _predict(
        self, model: Denoiser, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        told = self.schedule.tell(timesteps)
        output = call_denoiser(model, noisy, told, conditioning)
        return self.schedule.read_output(output, noisy, timesteps)
