"""Let blocks stand in for self-attentions of a ComfyUI model, on a clone of it.

The forward of an attention is replaced by an object patch, which ComfyUI puts in while the clone is
in use and takes out again. A patch of another node that is there already is what the attention is
from then on. The blocks are a model of their own beside it, so that ComfyUI moves them to the
device and frees them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

import convfusion
from convfusion.errors import ConvFusionError
from convfusion.families import shorten_path
from convfusion.mixers.base import TokenMixer
from convfusion.mixers.tokens import Grid
from convfusion.surgery import mixers_of

from .layout import build_skeleton, find_places

KEY = "convfusion"  # of the blocks among the further models of a clone


@dataclass(frozen=True)
class Window:
    """The part of the sampling in which blocks stand in.

    Attributes:
        highest, lowest: noise levels σ, both within it.
    """

    highest: float = float("inf")
    lowest: float = 0.0

    @property
    def is_whole(self) -> bool:
        return self.highest == float("inf") and self.lowest == 0

    def holds(self, sigmas: Tensor) -> bool:
        """Whether a call is within it, by the σ of its samples."""
        return self.is_whole or self.lowest <= float(sigmas.max()) <= self.highest


@dataclass(frozen=True)
class SitePatch:
    """What ComfyUI calls in place of the forward of a self-attention.

    Attributes:
        path: of the site.
        mixer: the block that stands in.
        attention: the forward that was there.
        window: in which the block stands in.
        min_tokens: with fewer of them, the attention stays.
    """

    path: str
    mixer: TokenMixer
    attention: Any
    window: Window
    min_tokens: int

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        transformer_options: Mapping[str, Any] = {},  # as ComfyUI has it
    ) -> Tensor:
        sigmas = transformer_options.get("sigmas")
        inside = sigmas is None or self.window.holds(sigmas)
        if not inside or x.shape[1] < self.min_tokens:
            return self.attention(x, context, value, mask, transformer_options)
        grid = read_grid(self.path, x, context, value, mask, transformer_options)
        return run_block(self.mixer, x, grid)


def read_grid(
    path: str,
    x: Tensor,
    context: Tensor | None,
    value: Tensor | None,
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> Grid:
    """(H, W) of the tokens of a call.

    Raises:
        ConvFusionError: another node has given this attention keys from elsewhere, or has put its
            tokens into another order.
    """
    if "activations_shape" not in options:
        raise ConvFusionError("this ComfyUI does not say where tokens lie: update ComfyUI")
    height, width = options["activations_shape"][-2:]
    foreign = any(each is not None and each is not x for each in (context, value))
    if foreign or mask is not None or height * width != x.shape[1]:
        raise ConvFusionError(
            f"another node changes what the self-attention {path} looks at, as ToMe, HyperTile and "
            "reference-only do: take it out, or keep this attention"
        )
    return height, width


def run_block(mixer: TokenMixer, tokens: Tensor, grid: Grid) -> Tensor:
    """A block's output, also where ComfyUI had no room for all of its weights on the device."""
    state = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
    if all(t.device == tokens.device and t.dtype == tokens.dtype for t in state.values()):
        return mixer(tokens, grid)
    here = {name: tensor.to(tokens.device, tokens.dtype) for name, tensor in state.items()}
    return functional_call(mixer, here, (tokens, grid))


class BlockStore(nn.Module):
    """The blocks of a file, as one model for ComfyUI to move and to free."""

    def __init__(self, mixers: Collection[TokenMixer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mixers)


def apply_blocks(
    model: Any,
    file: Path,
    *,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    min_tokens: int = 0,
    keep: str = "",
) -> Any:
    """A clone of a ComfyUI model in which the blocks of a file stand in for self-attentions.

    Args:
        model: a `ModelPatcher`.
        file: of blocks, ours or the paper's authors'.
        start_percent, end_percent: part of the sampling in which they do.
        min_tokens: with fewer tokens than that, an attention stays as it is.
        keep: patterns of sites, divided by commas, whose attention stays; over their paths or over
            the short names that reports have.

    Raises:
        ConvFusionError: the file does not fit the model, or a pattern matches none of its sites.
    """
    import comfy.model_patcher

    places = find_places(model)
    skeleton = build_skeleton(model, places)
    convfusion.load(skeleton, file)
    mixers = leave_out(mixers_of(skeleton), keep)
    window = find_window(model, start_percent, end_percent)
    patched = model.clone()
    for path, mixer in mixers.items():
        name = places[path].forward
        attention = patched.get_model_object(name)
        patch = SitePatch(path, mixer.eval(), attention, window, min_tokens)
        patched.add_object_patch(name, patch)
    store = comfy.model_patcher.ModelPatcher(
        BlockStore(mixers.values()),
        load_device=model.load_device,
        offload_device=model.offload_device,
    )
    beside = patched.get_additional_models_with_key(KEY)
    patched.set_additional_models(KEY, [*beside, store])
    return patched


def find_window(model: Any, start_percent: float, end_percent: float) -> Window:
    """The noise levels of a part of the sampling.

    Raises:
        ConvFusionError: it is empty.
    """
    if not 0 <= start_percent < end_percent <= 1:
        raise ConvFusionError(
            f"the blocks would stand in from {start_percent} to {end_percent} of the sampling: the "
            "first must be less than the second, and both lie between 0 and 1"
        )
    sampling = model.get_model_object("model_sampling")
    return Window(
        highest=float("inf") if start_percent == 0 else sampling.percent_to_sigma(start_percent),
        lowest=0.0 if end_percent == 1 else sampling.percent_to_sigma(end_percent),
    )


def leave_out(mixers: Mapping[str, TokenMixer], keep: str) -> dict[str, TokenMixer]:
    """The blocks except those of sites whose attention is kept.

    Raises:
        ConvFusionError: a pattern matches none, or all are left out.
    """
    patterns = [pattern.strip() for pattern in keep.split(",") if pattern.strip()]
    names = {path: (path, shorten_path(path)) for path in mixers}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for both in names.values() for name in both):
            listed = ", ".join(short for _, short in names.values())
            raise ConvFusionError(f"{pattern!r} matches no site with a block; there are: {listed}")
    left = {
        path: mixer
        for path, mixer in mixers.items()
        if not any(fnmatchcase(name, pattern) for name in names[path] for pattern in patterns)
    }
    if not left:
        raise ConvFusionError("every attention is kept: there is nothing to apply")
    return left
