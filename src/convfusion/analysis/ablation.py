"""What a model draws when its self-attention is restricted or taken away, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from convfusion.analysis.capture import (
    DenoiserCall,
    check_prompts,
    choose_timesteps,
    counted_calls,
    recorded_calls,
    stock_denoiser,
    visited_timesteps,
)
from convfusion.errors import ConvFusionError
from convfusion.evaluate import mean_psnr, relative_error
from convfusion.families import (
    denoiser_of,
    latent_scale,
    list_sites,
    native_size,
    noisy_latents,
    site_grid,
    stack_samples,
)
from convfusion.files import write_picture, write_text
from convfusion.generate import generate
from convfusion.mixers import MeanOnly, Mixer, Neighbourhood, Removed
from convfusion.report import draw_grid
from convfusion.schedule import noise_schedule
from convfusion.surgery import convert, revert
from convfusion.surgery.config import ConvertConfig

STOCK = "self-attention"


@dataclass(frozen=True)
class Ablated:
    """What one variant does.

    Attributes:
        images: one per prompt, from equal seeds.
        epsilon_error: mean of ‖ε̂ − ε̃‖²/‖ε̃‖² over the states that the stock model visits.
        by_timestep: the same at each timestep.
        psnr: mean over images of each one's PSNR against that of the stock model, dB; None if all
            are equal.
        psnr_error: its standard error over prompts; None of a single prompt.
    """

    images: list[Image.Image]
    epsilon_error: float
    by_timestep: dict[float, float]
    psnr: float | None
    psnr_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """The errors as JSON-ready values."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}


def list_variants(windows: list[int], sites: list[str] | None = None) -> dict[str, ConvertConfig]:
    """Neighbourhood attention of each window, the mean token alone, and nothing, by name.

    Args:
        windows: odd sides K.
        sites: patterns of site paths; by default every site.
    """
    mixers: dict[str, Mixer] = {f"window {k}": Neighbourhood(k) for k in windows}
    mixers |= {"mean token only": MeanOnly(), "removed": Removed()}
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
    timesteps: tuple[float, ...] | None = None,
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
    check_prompts(prompts)
    model = stock_denoiser(pipe)
    noise_schedule(pipe.scheduler, denoiser_of(pipe))
    for config in tried.values():
        check_windows(pipe, config, size)

    def draw() -> list[Image.Image]:
        with counted_calls(model, on_call):
            return generate(
                pipe, prompts, steps=steps, guidance=guidance, size=size, batch_size=batch_size
            )

    chosen = choose_timesteps(steps, timesteps, visited_timesteps(pipe, steps, draw))
    with recorded_calls(pipe, chosen) as calls:
        stock = draw()
    results = {STOCK: Ablated(stock, 0.0, dict.fromkeys(chosen, 0.0), None, None)}
    for name, config in tried.items():
        convert(pipe, replace(config, keep_attention=True))
        try:
            images = draw()
            errors = replay(pipe, calls)
        finally:
            revert(pipe)
        mean = sum(errors.values()) / len(errors)
        results[name] = Ablated(images, mean, errors, *mean_psnr(images, stock, prompts))
    return results


def save_ablation(results: dict[str, Ablated], prompts: list[str], folder: str | Path) -> None:
    """Write what `ablate` returns: pictures as `ablation.png`, errors as `ablation.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    grid = draw_grid({name: row.images for name, row in results.items()}, prompts)
    write_picture(folder / "ablation.png", grid)
    table = {name: row.to_dict() for name, row in results.items()}
    write_text(folder / "ablation.json", json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def check_windows(pipe: Any, config: ConvertConfig, size: tuple[int, int] | None) -> None:
    """Raise a ConvFusionError for a neighbourhood that no grid of its sites is as large as."""
    model = denoiser_of(pipe)
    height, width = (side // latent_scale(pipe) for side in size or native_size(pipe))
    sites = {site.path: site for site in list_sites(model)}
    largest: dict[Neighbourhood, int] = {}
    for path, mixer in config.mixers_for(sites).items():
        if isinstance(mixer, Neighbourhood):
            grid = site_grid(model, sites[path], (height, width))
            largest[mixer] = max(largest.get(mixer, 0), *grid)
    for mixer, side in largest.items():
        if mixer.window > side:
            raise ConvFusionError(
                f"a window of {mixer.window} is larger than every grid of tokens it is for: "
                f"the largest side is {side}"
            )


@torch.no_grad()
def replay(pipe: Any, calls: list[DenoiserCall]) -> dict[float, float]:
    """Mean ‖ε̂ − ε̃‖²/‖ε̃‖² of a changed denoiser at each timestep, on recorded calls."""
    model = denoiser_of(pipe)
    schedule = noise_schedule(pipe.scheduler, model)
    errors: dict[float, list[torch.Tensor]] = {}
    for call in calls:
        output = stack_samples(model(*call.args, **{**call.kwargs, "return_dict": False})[0])
        noisy = stack_samples(noisy_latents(model, call.args, call.kwargs))
        steps = torch.full((len(noisy),), round(call.timestep), device=noisy.device)
        changed, stock = (schedule.read_output(o, noisy, steps) for o in (output, call.output))
        errors.setdefault(call.timestep, []).append(relative_error(changed, stock))
    return {t: torch.cat(parts).mean().item() for t, parts in errors.items()}
