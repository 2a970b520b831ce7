"""What stands at a converted site, and how every way into a diffusers attention comes to it.

A converted self-attention is the module that it was, with another class: a subclass of its own,
made once for each attention class (`Attention`, `WanAttention`, …). There are two ways into an
attention, and both lead to the mixer: `forward`, and the `processor` that diffusers' own `forward`
calls. The second one matters where another library holds on to the `forward` that it found, as
accelerate's and diffusers' hooks do: what they call, before or after a conversion or its undoing,
is what stands at the site then.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.families.carrier import GRID, read_grid, without_grid
from convfusion.families.joint import JointLayout
from convfusion.mixers.base import TokenMixer, read_maps
from convfusion.mixers.joint import attend_from_text

# What the layers that hold an attention's weights are called, in any class of them.
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out", "to_qkv", "to_kv"),
    *("to_query", "to_key", "to_value", "out_layer"),
    "to_gate_logits",
)

# Norms of queries and keys, where they have any.
NORMS = ("norm_q", "norm_k", "query_norm", "key_norm")

# Processors that compute an attention as it is, each in a way of its own: a mixer replaces that.
_PLAIN = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "CosmosAttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "FusedHunyuanAttnProcessor2_0",
        "FusedJointAttnProcessor2_0",
        "HunyuanAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)


def let_stand(paths: Iterable[str]) -> str:
    """What works where only an attention will do, for the end of a message."""
    listed = ", ".join(map(repr, paths))
    return f"let the attention stand: with convfusion.surgery.attention_back(pipe, [{listed}])"


def is_foreign(attention: Any, processor: Any) -> bool:
    """Whether a processor does more than compute an attention of this class."""
    own = getattr(attention, "_default_processor_cls", None)
    plain = (type(None), *([own] if own else []), *getattr(attention, "_available_processors", ()))
    layout = getattr(attention, "layout", None)
    named = _PLAIN if layout is None else _PLAIN.union(layout.processors)
    return type(processor).__name__ not in named and type(processor) not in plain


def check_processor(site: str, processor: Any) -> None:
    """Refuse a processor whose guidance would be silently void on a converted self-attention.

    Raises:
        ConvFusionError: it is one of perturbed-attention guidance (PAG).
    """
    if type(processor).__name__.startswith("PAG"):
        raise ConvFusionError(
            f"perturbed-attention guidance (PAG) perturbs the self-attention, and {site} is "
            f"converted: choose `pag_applied_layers` that are not, or {let_stand([site])}"
        )


class ConvFusionProcessor:
    """The attention processor of every converted self-attention: it calls the mixer."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *rotary: Any,
        grid: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Mix tokens [B, N, C] on the grid that `grid`, [H, W, 0] or [T, H, W, 0], has as shape.

        A rotary embedding is of the attention: a mixer has no use for one, but for the grid that
        may travel behind it, or among the settings of a sparse mode.

        Raises:
            ConvFusionError: there is no grid, it has not N places, or there are further tokens to
                attend to, or a mask.
        """
        if hidden_states.ndim == 4:
            return self.mix_maps(attention, hidden_states)
        if grid is None:
            grid = read_grid((*rotary, *others.values()))
        if grid is None:
            raise _without_grid(attention.site)
        if others.get("perturbation_mask") is not None:
            raise ConvFusionError(
                f"spatio-temporal guidance perturbs the self-attention, and {attention.site} is "
                "converted: choose `spatio_temporal_guidance_blocks` that are not, or "
                + let_stand([attention.site])
            )
        if attention_mask is not None:
            raise ConvFusionError(
                "a converted self-attention takes no mask, as of causal attention: "
                + attention.site
            )
        if not _is_itself(encoder_hidden_states, hidden_states):
            raise ConvFusionError(
                f"the converted self-attention {attention.site} was given further tokens to attend "
                "to, as in reference-only or shared attention, and a mixer knows its own alone: "
                + let_stand([attention.site])
            )
        sides = tuple(grid.shape[:-1])
        if hidden_states.shape[1] != math.prod(sides):
            named = "×".join(map(str, sides))
            raise ConvFusionError(
                f"the converted self-attention {attention.site} was given "
                f"N = {hidden_states.shape[1]} tokens, but the grid {named} has "
                f"{math.prod(sides)}: take off what merges or adds tokens (such as tomesd), or "
                + let_stand([attention.site])
            )
        processor = attention.get_processor()
        if is_foreign(attention, processor):
            self.show(processor, attention, hidden_states, without_grid(others))
        return attention.mixer(hidden_states, sides)

    def mix_maps(self, attention: Any, maps: Tensor) -> Tensor:
        """Mix maps [B, C, H, W], with the norm, the skip and the scale of their attention."""
        sides = tuple(maps.shape[-2:])
        mixed = (
            attention.mixer(read_maps(attention, maps), sides).transpose(1, 2).unflatten(2, sides)
        )
        return (mixed + maps) / attention.rescale_output_factor

    def show(self, processor: Any, attention: Any, tokens: Tensor, others: dict[str, Any]) -> None:
        """Call another library's processor for what it records; what it returns is not used.

        Attend-and-Excite counts its calls, and self-attention guidance keeps the attention's map.
        """
        check_processor(attention.site, processor)
        if isinstance(attention, DroppedAttention):
            raise ConvFusionError(
                f"{type(processor).__name__} works with the self-attention of {attention.site}, "
                "whose weights were dropped: convert with keep_attention=True"
            )
        known = inspect.signature(processor.__call__).parameters
        processor(attention, tokens, **{key: v for key, v in others.items() if key in known})


def mix_joint(attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a converted attention returns that text and image share.

    Raises:
        ConvFusionError: there is no grid, there are fewer tokens than it has places, or something
            was put there since that computes another attention.
    """
    layout: JointLayout = attention.layout
    grid = kwargs.pop(GRID, None)
    if grid is None:
        grid = read_grid((*args, *kwargs.values()))
    if grid is None:
        raise _without_grid(attention.site)
    check_joint(attention.site, layout, attention)
    sides = tuple(grid.shape[:-1])
    tokens = layout.project(attention, sides, *args, **kwargs)
    places = tokens.image.query.shape[2]
    if places != math.prod(sides):
        raise ConvFusionError(
            f"the converted attention {attention.site} was given {places} tokens of the image, but "
            f"the grid {'×'.join(map(str, sides))} has {math.prod(sides)}: a grid that is given "
            "must be of the picture that is drawn, and this model takes no further pictures; or "
            + let_stand([attention.site])
        )
    image = attention.mixer(tokens, sides)
    return layout.finish(attention, image, attend_from_text(tokens), *args, **kwargs)


def check_joint(site: str, layout: JointLayout, attention: Any) -> None:
    """Refuse an attention of text and image that is computed in another way than its class does.

    Raises:
        ConvFusionError: its projections are fused, or its processor is another library's.
    """
    if getattr(attention, "fused_projections", False):
        raise ConvFusionError(
            f"the projections of {site} are fused: call unfuse_qkv_projections() before, since "
            "text and image are projected apart where a block stands in"
        )
    processor = type(attention.get_processor()).__name__
    if processor not in (*layout.processors, "NoneType"):
        raise ConvFusionError(
            f"{site} has the processor {processor}, which computes another attention than its "
            f"model was trained with: take it off, or {let_stand([site])}"
        )


def _without_grid(site: str) -> ConvFusionError:
    return ConvFusionError(
        f"no grid reached the converted self-attention {site}: call the denoiser "
        "itself, model(…), since model.forward(…) skips the hooks that pass the grid on; "
        "and a patch of a block must pass on the block's cross_attention_kwargs"
    )


def _is_itself(given: Tensor | None, tokens: Tensor) -> bool:
    """Whether what is to be attended to are the tokens themselves."""
    if given is None or given is tokens:
        return True
    if torch.compiler.is_compiling() or given.shape != tokens.shape:
        return False
    return torch.equal(given, tokens)


_PROCESSOR = ConvFusionProcessor()


class MixedAttention(nn.Module):
    """A self-attention whose forward is its child `mixer`; its weights wait for `revert`.

    What stands at a site is of a class of `mixed_class`, which is of the attention's class too.

    Attributes:
        stock: the class of the attention, which `revert` gives back.
        mixer: what is computed.
        site: the path of this attention.
        layout: how text and image share it; None where it is of the image alone.
    """

    stock: ClassVar[type[nn.Module]]
    mixer: TokenMixer
    site: str
    layout: JointLayout | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Mix tokens; see `ConvFusionProcessor` and `mix_joint`."""
        if not isinstance(self, MixedAttention):  # taken by a hook before the site was reverted
            return type(self).forward(self, *args, **kwargs)
        if self.layout is not None:
            return mix_joint(self, args, kwargs)
        return _PROCESSOR(self, *args, **kwargs)

    @property
    def processor(self) -> Any:
        """What diffusers' own `Attention.forward` calls."""
        return _PROCESSOR

    @processor.setter
    def processor(self, processor: Any) -> None:
        check_processor(self.site, processor)
        vars(self)["processor"] = processor

    def set_processor(self, processor: Any) -> None:
        """Keep a processor for the attention, as diffusers does."""
        if not isinstance(processor, nn.Module):
            self._modules.pop("processor", None)
        self.processor = processor

    def get_processor(self, *args: Any, **kwargs: Any) -> Any:
        """The processor that the attention would have."""
        return vars(self).get("processor") or self._modules.get("processor")


class DroppedAttention(MixedAttention):
    """A converted self-attention without its stock weights."""

    def __getattr__(self, name: str) -> Any:
        if name in PROJECTIONS:
            raise AttributeError(
                f"{name}: the self-attention weights of this site were dropped; what needs them "
                "works on a model converted with keep_attention=True"
            )
        return super().__getattr__(name)


_classes: dict[tuple[type[nn.Module], bool], Any] = {}


def mixed_class(stock: type[nn.Module], *, dropped: bool = False) -> Any:
    """The class of a converted attention of some class, with its weights or without."""
    if (stock, dropped) not in _classes:
        base, word = (DroppedAttention, "Dropped") if dropped else (MixedAttention, "Mixed")
        made = type(f"{word}{stock.__name__}", (base, stock), {"stock": stock})
        _classes[stock, dropped] = made
    return _classes[stock, dropped]


def put_mixer(
    attention: Any, mixer: TokenMixer, site: str, layout: JointLayout | None = None
) -> None:
    """Let a mixer stand in for an attention, in place; the attributes are those of the class."""
    attention.__class__ = mixed_class(type(attention))
    attention.mixer = mixer.train(attention.training)
    attention.site, attention.layout = site, layout


def replaced_layers(attention: nn.Module) -> dict[str, nn.Module]:
    """The layers of an attention that a mixer takes the place of, by name.

    There are none where text and image share it: its mixer works with what they project.
    """
    if getattr(attention, "layout", None) is not None:
        return {}
    names = {*PROJECTIONS, *NORMS}
    return {name: layer for name, layer in attention.named_children() if name in names}


def resting_mixer(attention: nn.Module) -> TokenMixer | None:
    """The mixer of an attention that stands in for it, or that it stands in for."""
    mixer = attention._modules.get("mixer") if "site" in vars(attention) else None
    return mixer if isinstance(mixer, TokenMixer) else None
