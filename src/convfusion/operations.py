"""Operations of a self-attention and of what replaced it, counted on the meta device."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of, list_sites, site_grid
from convfusion.mixers import Circular, Neighbourhood
from convfusion.mixers.base import Grid, TokenMixer
from convfusion.ops import library
from convfusion.surgery.mixed import MixedAttention


def _sdpa_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch's counter knows the attention kernels of GPUs, and passes over the CPU's and ours.
MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_on_cpu,
    **library.FLOPS,
}


def count(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations (two per multiply-add) of one call, by PyTorch's counter.

    Matrix products, convolutions and attention count, on any device; additions, norms, gates and
    interpolation do not.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def mixer_operations(mixer: TokenMixer, tokens: Tensor, grid: Grid) -> int:
    """Operations of one call of a token mixer; of windowed attention, those of its windows."""
    settings, (_, count_of_tokens, channels) = mixer.config, tokens.shape
    if isinstance(settings, Neighbourhood | Circular):
        projections = 4 * 2 * count_of_tokens * channels**2
        return len(tokens) * (projections + 2 * 2 * channels * pairs_in_windows(settings, grid))
    return count(mixer, tokens, grid)


def pairs_in_windows(mixer: Neighbourhood | Circular, grid: Grid) -> int:
    """How many pairs of query and key a windowed attention compares on a grid (H, W).

    A kernel made for the window works out these and no more; the tiles of
    `convfusion.mixers.windows` also work out pairs that they then mask.
    """
    height, width = grid
    if isinstance(mixer, Neighbourhood):
        return height * width * min(mixer.window, height) * min(mixer.window, width)
    reach = range(1 - mixer.radius, mixer.radius)
    within = sum(
        max(0, height - abs(dy)) * max(0, width - abs(dx))
        for dy, dx in product(reach, reach)
        if dy**2 + dx**2 < mixer.radius**2
    )
    return within + height * width * mixer.mean_token


def site_flops(pipe_or_model: Any, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Operations at each converted site for latents of (height, width), one sample.

    Returns:
        By site path, those of the attention with its four projections and those of the mixer.

    Raises:
        ConvFusionError: the attention was dropped, or nothing is converted.
    """
    model = denoiser_of(pipe_or_model)
    counts: dict[str, tuple[int, int]] = {}
    for site in list_sites(model):
        attention = model.get_submodule(site.path)
        if not isinstance(attention, MixedAttention):
            continue
        if not hasattr(attention, "to_q"):
            raise ConvFusionError("the attention was dropped: there is nothing to compare with")
        height, width = site_grid(model, site, size)
        mixed: Any = copy.deepcopy(attention).to("meta")
        tokens = torch.empty(
            1, height * width, site.channels, device="meta", dtype=mixed.to_q.weight.dtype
        )
        block = mixer_operations(mixed.mixer, tokens, (height, width))
        mixed.__class__ = Attention
        counts[site.path] = (count(mixed, tokens), block)
    if not counts:
        raise ConvFusionError("this model is not converted: there is nothing to compare")
    return counts


def flops_ratio(pipe_or_model: Any, size: tuple[int, int]) -> float:
    """Operations of all replaced attentions over those of their mixers, latents (height, width)."""
    counts = site_flops(pipe_or_model, size).values()
    return sum(attention for attention, _ in counts) / max(1, sum(mixer for _, mixer in counts))
