"""Blocks for a ComfyUI model without training, set by what its own self-attentions do.

A few pictures are drawn. On the way, some of the tokens that each self-attention is given are kept,
and some calls of the whole denoiser. Each block is set from the tokens of its site; the calls are
then made again with blocks, which tells how far they are from the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convfusion
from convfusion.budget import Allocation, Budget, Moments, SiteMoments, choose_mixers
from convfusion.budget.measure import CALLS, CallReservoir, measure_site
from convfusion.evaluate.epsilon import relative_error
from convfusion.families import list_sites, shorten_path
from convfusion.families.watch import TokenReservoir
from convfusion.mixers import Mixer, Removed
from convfusion.mixers.base import TokenMixer, projections
from convfusion.mixers.tokens import TokenSample
from convfusion.surgery import ConvertConfig, build_mixers, install, uniform
from convfusion.surgery.layers import FLOATS
from convfusion.surgery.start import start_mixer

from .layout import Place, build_skeleton, compute_dtype, find_places
from .patching import read_grid, run_block

OnProgress = Callable[[int, int], None]

MEMORY = 2.0  # GiB on the CPU for tokens, over all sites


@dataclass(frozen=True)
class Drawing:
    """The pictures that are drawn to measure with.

    Attributes:
        positive, negative: conditioning, as CONDITIONING sockets carry it.
        latent: [B, C, h, w], whose size is drawn.
        pictures: how often, with one seed after the other.
        steps: of each.
        guidance: scale of classifier-free guidance.
        seed: of the first.
    """

    positive: Any
    negative: Any
    latent: Tensor
    pictures: int = 4
    steps: int = 12
    guidance: float = 7.0
    seed: int = 0


@dataclass
class WatchedSite:
    """In place of a self-attention while it is measured: the attention, or a block for a while.

    Attributes:
        place: of the attention.
        attention: its forward.
        tokens: where what it is given goes; None once enough was seen.
        mixer: what stands in, if anything does.
    """

    place: Place
    attention: Any
    tokens: TokenReservoir | None
    mixer: TokenMixer | None = None

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        transformer_options: Mapping[str, Any] = {},  # as ComfyUI has it
    ) -> Tensor:
        path = self.place.path
        grid = read_grid(path, x, context, value, mask, transformer_options)
        if self.mixer is not None:
            return run_block(self.mixer, x, grid)
        if self.tokens is not None:
            self.tokens.add(path, TokenSample(x, grid))
        return self.attention(x, context, value, mask, transformer_options)


@torch.inference_mode(False)  # in which ComfyUI runs nodes: blocks are set outside of it
@torch.no_grad()
def convert_untrained(
    model: Any,
    drawing: Drawing,
    wanted: Mixer | Budget,
    target: Path,
    on_progress: OnProgress,
) -> str:
    """Write blocks for a ComfyUI model, set by what its self-attentions do.

    Args:
        model: a `ModelPatcher`, which is left as it was.
        drawing: the pictures to measure with.
        wanted: what stands at every site; or a budget, within which it is chosen site by site.
        target: a `.safetensors` file, which is written last.
        on_progress: called with the work that is done, and all.

    Returns:
        A report for people: what stands at each site, and how far it is from the attention.

    Raises:
        ConvFusionError: the model is of no kind that is known, a budget cannot be reached, or
            another node has changed what its attentions look at.
    """
    places = find_places(model)
    skeleton = build_skeleton(model, places)
    with _Measured(model, places, skeleton, on_progress) as measured:
        passes = 2 if isinstance(wanted, Budget) else 1  # over the sites
        measured.total = drawing.pictures * drawing.steps + len(places) * passes
        measured.draw(drawing)
        if isinstance(wanted, Budget):
            chosen = measured.choose(wanted, drawing.latent.shape[-2:])
            config = chosen.config()
        else:
            chosen, config = None, uniform(wanted)
        mixers, imitation = measured.start(config)
        errors = measured.compare(mixers)
        removed = measured.compare(build_mixers(skeleton, list_sites(skeleton), uniform(Removed())))
    for mixer in mixers.values():
        mixer.to(compute_dtype(model))
    install(skeleton, mixers, keep_attention=True)
    convfusion.save(skeleton, target)
    return _report(target, chosen, imitation, errors, removed)


class _Measured:
    """A clone of a model whose sites are watched, and what was seen of them."""

    def __init__(
        self,
        model: Any,
        places: Mapping[str, Place],
        skeleton: Any,
        on_progress: OnProgress,
    ) -> None:
        self.skeleton, self.on_progress = skeleton, on_progress
        self.tokens = TokenReservoir(places, MEMORY)
        self.calls = CallReservoir(CALLS)
        self.clone = model.clone()
        self.watched: dict[str, WatchedSite] = {}
        for path, place in places.items():
            attention = self.clone.get_model_object(place.forward)
            self.watched[path] = WatchedSite(place, attention, self.tokens)
            self.clone.add_object_patch(place.forward, self.watched[path])
        self.inner = model.model_options.get("model_function_wrapper")
        self.done = self.total = 0

    def __enter__(self) -> _Measured:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Take the patches out at once: they hold tokens, and ComfyUI leaves them in till later."""
        self.clone.unpatch_model(unpatch_weights=False)

    def step(self) -> None:
        """Count a part of the work, unless the person in front of it has stopped it."""
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.on_progress(self.done, self.total)

    @torch.inference_mode()
    def draw(self, drawing: Drawing) -> None:
        """Draw pictures, and keep tokens and calls on the way."""
        import comfy.sample

        self.clone.set_model_unet_function_wrapper(self._record)
        latent = comfy.sample.fix_empty_latent_channels(self.clone, drawing.latent)
        for number in range(drawing.pictures):
            seed = drawing.seed + number
            comfy.sample.sample(
                self.clone,
                comfy.sample.prepare_noise(latent, seed),
                drawing.steps,
                drawing.guidance,
                "euler",
                "normal",
                drawing.positive,
                drawing.negative,
                latent,
                callback=lambda *_: self.step(),
                disable_pbar=True,
                seed=seed,
            )
        for site in self.watched.values():
            site.tokens = None

    def _record(self, apply_model: Any, arguments: Mapping[str, Any]) -> Tensor:
        call = {**arguments, "c": {**arguments["c"]}}
        call["c"]["transformer_options"] = dict(arguments["c"]["transformer_options"])
        denoised = self._call(apply_model, arguments)
        self.calls.add(call, (_noise(call, denoised),))
        return denoised

    def _call(self, apply_model: Any, call: Mapping[str, Any]) -> Tensor:
        if self.inner is not None:  # as another node has set it
            return self.inner(apply_model, call)
        return apply_model(call["input"], call["timestep"], **call["c"])

    def choose(self, budget: Budget, latents: Sequence[int]) -> Allocation:
        """The mixers within the budget, by what replacing each site would cost."""
        sites: list[SiteMoments] = []
        for site in list_sites(self.skeleton):
            place = self.watched[site.path].place

            def change(mixer: TokenMixer, path: str = site.path) -> float:
                return self.compare({path: mixer}).mean().item()

            with lend_weights(self.skeleton, place, self.clone.load_device):
                sample = self.tokens.kept[site.path]
                sites.append(measure_site(self.skeleton, site, sample, change))
            self.step()
        size = latents[0], latents[1]
        moments = Moments("measured in ComfyUI", size, tuple(sites))
        return choose_mixers(self.skeleton, budget, moments=moments, size=size)

    def start(self, config: ConvertConfig) -> tuple[dict[str, TokenMixer], dict[str, float]]:
        """A block for each site, set from its attention, and how far it is from it."""
        mixers: dict[str, TokenMixer] = {}
        errors: dict[str, float] = {}
        sites = list_sites(self.skeleton)
        for path, settings in config.mixers_for(site.path for site in sites).items():
            attention = self.skeleton.get_submodule(path)
            with lend_weights(self.skeleton, self.watched[path].place, self.clone.load_device):
                site = [each for each in sites if each.path == path]
                only = ConvertConfig({path: settings})
                mixers[path] = build_mixers(self.skeleton, site, only)[path]
                if mixers[path].has_measured_start:
                    sample = self.tokens.kept[path]
                    errors[path] = start_mixer(path, mixers[path], attention, sample)
            self.step()
        return mixers, errors

    @torch.inference_mode()
    def compare(self, mixers: Mapping[str, TokenMixer]) -> Tensor:
        """Relative squared error of the predicted noise with blocks in place, of each sample."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.clone])
        for path, mixer in mixers.items():
            self.watched[path].mixer = mixer
        try:
            errors = []
            for call, taught in self.calls.kept:
                learned = _noise(call, self._call(self.clone.model.apply_model, call))
                errors.append(relative_error(learned, taught))
        finally:
            for path in mixers:
                self.watched[path].mixer = None
        return torch.cat(errors)


def _noise(call: Mapping[str, Any], denoised: Tensor) -> Tensor:
    """σ·ε of a call, whose scale a relative error does not see."""
    return call["input"] - denoised


@contextmanager
def lend_weights(skeleton: Any, place: Place, device: torch.device) -> Iterator[None]:
    """Give one attention of a skeleton the weights that ComfyUI computes with, in float32."""
    own = projections(skeleton.get_submodule(place.path))
    for mine, theirs in zip(own, projections(place.attention), strict=True):
        weight, bias = read_layer(theirs, device)
        mine.weight = nn.Parameter(weight, requires_grad=False)
        mine.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        for layer in own:
            layer.to("meta")


def read_layer(layer: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer as it computes with them, in float32.

    ComfyUI may keep a layer quantised, or fold a LoRA in only when it is called: then it is asked
    what it makes of the unit vectors.
    """
    weight, bias = layer.weight, layer.bias
    folded = getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None)
    if type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS and not folded:
        return weight.detach().to(device, torch.float32), _floats(bias, device)
    units = torch.eye(layer.in_features, device=device)
    zero = layer(units[:1] * 0)
    columns = (layer(units) - zero).T.float().contiguous()
    return columns, None if bias is None else zero[0].float()


def _floats(bias: Tensor | None, device: torch.device) -> Tensor | None:
    return None if bias is None else bias.detach().to(device, torch.float32)


def _report(
    target: Path,
    chosen: Allocation | None,
    imitation: Mapping[str, float],
    errors: Tensor,
    removed: Tensor,
) -> str:
    mean, spread = errors.mean().item(), errors.std().item() / len(errors) ** 0.5
    without = removed.mean().item()
    lines = [
        f"{target.name}: blocks without training.",
        f"Error of the noise that the whole model predicts: {mean:.2e} ± {spread:.0e}, over "
        f"{len(errors)} samples of the pictures that were drawn.",
        f"That is 1/{without / mean:.3g} of the {without:.2e} without any self-attention.",
        "",
    ]
    if chosen is not None:
        lines += [str(chosen), ""]
    lines += ["Error of each block against its attention (1 is as far as its mean output):"]
    lines += [f"{shorten_path(path):<16}{error:.1e}" for path, error in imitation.items()]
    return "\n".join(lines)
