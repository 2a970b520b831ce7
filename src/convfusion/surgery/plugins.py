"""What other libraries have put into a model, where conversion must take notice of it.

On a converted site the attention is not computed any more, so neither is what others add to it: a
LoRA around its projections, a processor of its own, a `forward` in place of its own. Where that
would go unnoticed it is told or refused, with the names of the sites. The rest works as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser
from convfusion.surgery.layers import diffusers_hooks, projections, unwrapped
from convfusion.surgery.mixed import DroppedAttention, MixedAttention, is_foreign, let_stand

# Processors that want to be called on the self-attention, and do not mind what it returns.
_READERS = frozenset({"AttendExciteAttnProcessor", "CrossAttnStoreProcessor"})

_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # of what, by where it sits


def watch_plugins(model: Denoiser, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a converted denoiser: look at what has been plugged into its sites.

    It warns once of a LoRA that converted sites pass by, and of a processor of theirs.

    Raises:
        ConvFusionError: a site computes something else than its mixer, or guidance would be void.
    """
    if torch.compiler.is_compiling():
        return
    adapters: dict[str, list[str]] = {}
    processors: dict[str, list[str]] = {}
    for path, attention in _converted(model):
        check_forward(path, attention)
        _check_guidance(path, attention)
        for layer, name in _idle_adapters(attention):
            if _is_news(layer, name) and path not in adapters.setdefault(name, []):
                adapters[name].append(path)
        processor = attention.get_processor()
        kind = type(processor).__name__
        if is_foreign(attention, processor) and kind not in _READERS and _is_news(attention, kind):
            processors.setdefault(kind, []).append(path)
    _tell(adapters, processors)


def check_forward(path: str, attention: nn.Module) -> None:
    """Refuse an attention whose own `forward` does not lead to the one that it hides.

    Raises:
        ConvFusionError: it computes something else, as that of prompt-to-prompt.
    """
    forward = vars(attention).get("forward")
    if forward is not None and not _leads_back(forward, attention):
        name = getattr(forward, "__qualname__", type(forward).__name__)
        raise ConvFusionError(
            f"{path} has a `forward` of its own, {name}, that computes the attention by itself: "
            f"take that patch off, or {let_stand([path])}"
        )


def _converted(model: Denoiser) -> Iterator[tuple[str, MixedAttention]]:
    """The sites that still are as they were converted, with their paths."""
    for path in model._convfusion_sites:
        try:
            attention = model.get_submodule(path)
        except AttributeError:  # another library has replaced what holds it
            continue
        if isinstance(attention, MixedAttention):
            yield path, attention


def _leads_back(forward: Any, attention: nn.Module) -> bool:
    """Whether a function holds, anywhere within it, the `forward` of an attention's class."""
    own = [vars(kind)["forward"] for kind in type(attention).__mro__ if "forward" in vars(kind)]
    waiting, seen = [forward], {id(attention)}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, MethodType) and thing.__self__ is attention and thing.__func__ in own:
            return True
        waiting += _held(thing)
    return False


def _held(thing: Any) -> list[Any]:
    """What a function or method may call: what it closes over, has bound, or wraps."""
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values(), *vars(thing).values()]
    if isinstance(thing, FunctionType):
        cells = (cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell))
        values = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        return [*cells, *values, *vars(thing).values()]
    functions = (MethodType, partial, FunctionType)
    return [each for each in getattr(thing, "__dict__", {}).values() if isinstance(each, functions)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _check_guidance(path: str, attention: Any) -> None:
    """Refuse diffusers' guiders that perturb the scores or the queries of a self-attention."""
    hooks = list(diffusers_hooks(attention).values())
    if not isinstance(attention, DroppedAttention) and attention.layout is None:
        hooks += diffusers_hooks(next(iter(projections(attention)))).values()
    for hook in hooks:
        name = type(hook).__name__
        skips_scores = name == "AttentionProcessorSkipHook" and hook.skip_attention_scores
        if skips_scores or name == "SmoothedEnergyGuidanceHook":
            raise ConvFusionError(
                f"guidance by {name} perturbs the self-attention, and {path} is converted: choose "
                f"other layers for it, or {let_stand([path])}"
            )


def _idle_adapters(attention: Any) -> Iterator[tuple[nn.Module, str]]:
    """The active adapters around the unused projections of a site, each with its layer."""
    if isinstance(attention, DroppedAttention) or attention.layout is not None:
        return
    for layer in projections(attention):
        if unwrapped(layer) is not layer:
            if not getattr(layer, "disable_adapters", False):
                names = getattr(layer, "active_adapters", [type(layer).__name__])
                yield from ((layer, name) for name in names)
        elif "forward" in vars(layer) and not {"_hf_hook", "_diffusers_hook"} & vars(layer).keys():
            patch = vars(layer)["forward"]
            owner = getattr(patch, "__self__", patch)
            yield layer, getattr(owner, "__qualname__", type(owner).__name__)


def _is_news(place: nn.Module, name: str) -> bool:
    """Whether something has not been told of yet; from now on, it has."""
    told = _told.setdefault(place, set())
    new = name not in told
    told.add(name)
    return new


def _tell(adapters: dict[str, list[str]], processors: dict[str, list[str]]) -> None:
    if adapters:
        sites = list(dict.fromkeys(path for paths in adapters.values() for path in paths))
        warnings.warn(
            f"the LoRA {', '.join(sorted(adapters))} has no effect on {len(sites)} converted "
            f"self-attentions, {', '.join(sites)}; its other layers apply. To have all of it, "
            "fold it in first: pipe.fuse_lora(), pipe.unload_lora_weights(), convert, distil",
            stacklevel=3,
        )
    for kind, sites in processors.items():
        warnings.warn(
            f"the processor {kind} is called on {len(sites)} converted self-attentions for what "
            f"it records, and what it returns has no effect there: {', '.join(sites)}. If that "
            f"matters, {let_stand(sites)}",
            stacklevel=3,
        )
