"""The contract between a model family and everything else: its self-attention sites.

Surgery, distillation and benchmarks know nothing about a family but what an `Adapter` lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from convfusion.errors import UnsupportedModelError

Denoiser: TypeAlias = Any  # a diffusers ModelMixin and ConfigMixin; no type can say both

GRID = "grid"  # the keyword under which a grid travels to a self-attention


@dataclass(frozen=True)
class Site:
    """One self-attention of a model.

    Attributes:
        path: module path of the attention, such as
            `down_blocks.0.attentions.0.transformer_blocks.0.attn1`.
        channels: C of its tokens.
        heads: number of attention heads.
        level: how often the latents were halved before it (0 in a DiT).
        owner: module path of the module whose input tells the grid ('' is the model itself).
        tap: module path of the module whose first input is the hidden state right after this
            site, gated and added to the residual: the feature that distillation compares.
    """

    path: str
    channels: int
    heads: int
    level: int
    owner: str
    tap: str


@dataclass(frozen=True)
class GridHook:
    """Forward pre-hook of a site's owner: sends the grid along with the cross-attention kwargs.

    The grid travels as the shape of an empty tensor [H, W, 0], so that gradient checkpointing
    replays it with the other arguments and `torch.compile` treats its sizes as dynamic.

    Attributes:
        patch: side of a patch; the grid is ⌊H/patch⌋ × ⌊W/patch⌋ of the owner's input [B, C, H, W].
        position: where `cross_attention_kwargs` stands among the positional arguments.
    """

    patch: int
    position: int

    @classmethod
    def of(cls, owner: type[Any], patch: int) -> GridHook:
        """For owners of a class, whose `forward` takes `cross_attention_kwargs`."""
        return cls(patch, argument_position(owner, "cross_attention_kwargs"))

    def grid(self, args: tuple, kwargs: dict) -> tuple[int, int]:
        """(H, W) of the tokens, from the arguments of a call of the owner."""
        maps: Tensor = args[0] if args else kwargs["hidden_states"]
        return maps.shape[-2] // self.patch, maps.shape[-1] // self.patch

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        maps: Tensor = args[0] if args else kwargs["hidden_states"]
        grid = maps.new_empty((*self.grid(args, kwargs), 0))
        if len(args) > self.position:
            extra = {**(args[self.position] or {}), GRID: grid}
            return (*args[: self.position], extra, *args[self.position + 1 :]), kwargs
        extra = {**(kwargs.get("cross_attention_kwargs") or {}), GRID: grid}
        return args, {**kwargs, "cross_attention_kwargs": extra}


def argument_position(kind: type[Any], name: str) -> int:
    """The position of an argument of a module class's `forward`, counted without `self`."""
    return list(inspect.signature(kind.forward).parameters).index(name) - 1


def drop_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of every other attention in reach of a grid: it has no use for one."""
    return args, {key: value for key, value in kwargs.items() if key != GRID}


@dataclass(frozen=True)
class Adapter:
    """What the library knows about one family of denoisers.

    Attributes:
        family: short name, stored in checkpoints.
        class_name: the diffusers class.
        sites: lists the sites of a model, in the order of its modules.
        grid_hook: the hook for the owner modules of this model.
    """

    family: str
    class_name: str
    sites: Callable[[Denoiser], list[Site]]
    grid_hook: Callable[[Denoiser], GridHook]


_ADAPTERS: dict[str, Adapter] = {}


def register(adapter: Adapter) -> Adapter:
    """Make a family known.

    Raises:
        ValueError: its class is taken already.
    """
    if adapter.class_name in _ADAPTERS:
        raise ValueError(f"an adapter for {adapter.class_name} is registered already")
    _ADAPTERS[adapter.class_name] = adapter
    return adapter


def supported() -> list[str]:
    """The denoiser classes that have an adapter."""
    return sorted(_ADAPTERS)


def adapter_for(model: Denoiser) -> Adapter:
    """The adapter of a denoiser, found by the name of its class or of one it derives from.

    Raises:
        UnsupportedModelError: there is none.
    """
    for parent in type(model).__mro__:
        if parent.__name__ in _ADAPTERS:
            return _ADAPTERS[parent.__name__]
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported; supported are {', '.join(supported())}"
    )


def denoiser_of(pipe_or_model: Any) -> Denoiser:
    """The denoiser of a pipeline (its `unet` or `transformer`), or the model itself.

    Raises:
        UnsupportedModelError: there is no denoiser, or no adapter for it.
    """
    model = pipe_or_model
    if not isinstance(model, nn.Module):
        candidates = (getattr(pipe_or_model, name, None) for name in ("unet", "transformer"))
        model = next((found for found in candidates if found is not None), None)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(pipe_or_model).__name__} has no `unet` or `transformer`; give a diffusers "
            f"pipeline or one of {', '.join(supported())}"
        )
    adapter_for(model)
    return model


def list_sites(model: Denoiser) -> list[Site]:
    """All self-attention sites of a denoiser.

    Raises:
        UnsupportedModelError: unknown class, or no self-attention of a kind we can replace.
    """
    sites = adapter_for(model).sites(model)
    if not sites:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no self-attention in transformer blocks to replace"
        )
    return sites


def site_grid(model: Denoiser, site: Site, latents: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the tokens of a site for latents of (height, width)."""
    patch = adapter_for(model).grid_hook(model).patch
    height, width = (-(-side // 2**site.level) // patch for side in latents)
    return height, width


def transformer_blocks(model: Denoiser) -> list[tuple[str, BasicTransformerBlock]]:
    """All transformer blocks with their paths, in module order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, BasicTransformerBlock)]


def is_self_attention(block: BasicTransformerBlock) -> bool:
    """Whether `attn1` of a block attends to its own tokens."""
    return isinstance(block.attn1, Attention) and not block.attn1.is_cross_attention


def short_name(path: str) -> str:
    """A site's path, shortened: `down 0 1` is the second attention of the first down block."""
    names = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid"}
    words = path.removesuffix(".attn1").replace("transformer_blocks", "block").split(".")
    words = [names.get(word, word) for word in words if word != "attentions"]
    if words[0] == "mid":
        words = [words[0], *words[2:]]
    text = " ".join(words)
    return text.replace(" block 0", "") if "down" in text or "up" in text or "mid" in text else text
