"""What a model draws when its self-attention is restricted or taken away, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from convfusion.adapters import denoiser_of, list_sites, site_grid
from convfusion.analysis.capture import DenoiserCall, choose_timesteps, recorded_calls
from convfusion.conditioning import latent_scale
from convfusion.config import ConvertConfig
from convfusion.distill.losses import as_epsilon
from convfusion.errors import ConvFusionError
from convfusion.evaluate import mean_psnr, relative_error
from convfusion.generate import generate
from convfusion.mixers import MeanOnly, Mixer, Neighbourhood, Removed
from convfusion.surgery import convert, mixers_of, revert

STOCK = "self-attention"


@dataclass(frozen=True)
class Ablated:
    """What one variant does.

    Attributes:
        images: one per prompt, from equal seeds.
        epsilon_error: mean of ‖ε̂ − ε̃‖²/‖ε̃‖² over the states that the stock model visits.
        by_timestep: the same at each timestep.
        psnr: mean PSNR of the images against those of the stock model, dB; None for itself.
    """

    images: list[Image.Image]
    epsilon_error: float
    by_timestep: dict[int, float]
    psnr: float | None


def variants(
    windows: list[int],
    *,
    mean_only: bool = True,
    removed: bool = True,
    sites: list[str] | None = None,
) -> dict[str, ConvertConfig]:
    """Neighbourhood attention of each window, the mean token alone, and nothing, by name.

    Args:
        windows: odd sides K.
        mean_only: also try uniform attention.
        removed: also try no mixing at all.
        sites: patterns of site paths; by default every site.
    """
    mixers: dict[str, Mixer] = {f"window {k}": Neighbourhood(k) for k in windows}
    if mean_only:
        mixers["mean token only"] = MeanOnly()
    if removed:
        mixers["removed"] = Removed()
    patterns = sites or ["*"]
    return {
        name: ConvertConfig(sites=dict.fromkeys(patterns, mixer)) for name, mixer in mixers.items()
    }


def ablate(
    pipe: Any,
    prompts: list[str],
    tried: Mapping[str, ConvertConfig],
    *,
    steps: int = 25,
    timesteps: tuple[int, ...] | None = None,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    on_call: Callable[[], None] | None = None,
) -> dict[str, Ablated]:
    """Draw the prompts with each variant in place of the attention, and compare with the stock.

    The ε-error is measured on the very inputs that the stock denoiser meets while it draws, so
    that errors do not pile up over the steps. The pipeline is left as it was.

    Returns:
        The stock model first, under the name `STOCK`, then every variant.

    Raises:
        ConvFusionError: no prompts, a converted model, an unknown timestep or pattern, or a window
            that is larger than every grid.
    """
    if not prompts:
        raise ConvFusionError("there are no prompts to draw: at least one is needed")
    model = denoiser_of(pipe)
    if mixers_of(model):
        raise ConvFusionError("this model is converted: revert it to ablate its self-attention")
    chosen = choose_timesteps(pipe, steps, timesteps)
    for config in tried.values():
        check_windows(pipe, config, size)

    def draw() -> list[Image.Image]:
        counter = model.register_forward_hook(lambda *_: on_call() if on_call else None)
        try:
            return generate(
                pipe, prompts, steps=steps, guidance=guidance, size=size, batch_size=batch_size
            )
        finally:
            counter.remove()

    with recorded_calls(pipe, chosen) as calls:
        stock = draw()
    found = {STOCK: Ablated(stock, 0.0, dict.fromkeys(chosen, 0.0), None)}
    for name, config in tried.items():
        convert(pipe, config)
        try:
            images = draw()
            errors = replay(pipe, calls)
        finally:
            revert(pipe)
        mean = sum(errors.values()) / len(errors)
        found[name] = Ablated(images, mean, errors, mean_psnr(images, stock))
    return found


def check_windows(pipe: Any, config: ConvertConfig, size: tuple[int, int] | None) -> None:
    """Raise a ConvFusionError for a neighbourhood that no grid of its sites is as large as."""
    model = denoiser_of(pipe)
    side = model.config.sample_size
    height, width = (side, side) if size is None else (s // latent_scale(pipe) for s in size)
    sites = {site.path: site for site in list_sites(model)}
    grids = {
        path: site_grid(model, sites[path], (height, width))
        for path, mixer in config.mixers_for(sites).items()
        if isinstance(mixer, Neighbourhood)
    }
    largest = max((max(grid) for grid in grids.values()), default=0)
    for mixer in config.sites.values():
        if isinstance(mixer, Neighbourhood) and mixer.window > largest:
            raise ConvFusionError(
                f"a window of {mixer.window} is larger than every grid of tokens here: "
                f"the largest side is {largest}"
            )


@torch.no_grad()
def replay(pipe: Any, calls: list[DenoiserCall]) -> dict[int, float]:
    """Mean ‖ε̂ − ε̃‖²/‖ε̃‖² of a changed denoiser at each timestep, on recorded calls."""
    model = denoiser_of(pipe)
    schedule, kind = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type
    errors: dict[int, list[torch.Tensor]] = {}
    for call in calls:
        output = model(*call.args, **{**call.kwargs, "return_dict": False})[0]
        noisy = call.noisy
        steps = torch.full((len(noisy),), call.timestep, device=noisy.device)
        changed, stock = (
            as_epsilon(o, noisy, steps, schedule, kind) for o in (output, call.output)
        )
        errors.setdefault(call.timestep, []).append(relative_error(changed, stock))
    return {t: torch.cat(parts).mean().item() for t, parts in errors.items()}
