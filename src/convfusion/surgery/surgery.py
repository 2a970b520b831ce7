"""Replace self-attention in place, and put it back.

A site's attention becomes a `MixedAttention`, of a subclass of its own class, with the mixer as its
child `mixer`. So the module tree, every stock name and every stock weight stay where they were, and
reverting is a change of class. No diffusers forward code is copied: the grid of the tokens comes
with the other arguments, put there by a hook of a module that knows it (`families.carrier`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families import (
    Denoiser,
    Site,
    denoiser_of,
    denoisers_of,
    family_of,
    list_sites,
)
from convfusion.families.carrier import drop_grid
from convfusion.families.patches import copied_without_patches
from convfusion.families.watch import attention_at
from convfusion.mixers.base import TokenMixer, as_plain, fold_gates, projections
from convfusion.surgery import presets
from convfusion.surgery.config import ConvertConfig, checked_config
from convfusion.surgery.guard import guard, unguard
from convfusion.surgery.layers import (
    FLOATS,
    check_at_hand,
    check_projections,
    check_unhooked,
    compute_dtype,
    unwrapped,
)
from convfusion.surgery.mixed import (
    DroppedAttention,
    MixedAttention,
    check_joint,
    check_processor,
    mixed_class,
    put_mixer,
    replaced_layers,
    resting_mixer,
)
from convfusion.surgery.plugins import check_forward, watch_plugins
from convfusion.surgery.record import record_of
from convfusion.surgery.report import SiteStatus, Status


def convert(pipe_or_model: Any, config: ConvertConfig | str | None = None) -> Status:
    """Replace self-attention by token mixers, in place.

    Args:
        pipe_or_model: a diffusers pipeline, or its UNet or transformer; on any device, `meta` too.
            Both transformers of a Wan 2.2 pipeline are converted.
        config: which mixer goes where; the name of a preset; or None for the preset whose layout
            the model has (see `convfusion.surgery.presets`).

    Returns:
        What now stands at each site.

    Raises:
        UnsupportedModelError: no adapter for this class, or a site that is no plain attention.
        ConvFusionError: it is converted already, or the config does not fit. Nothing is changed.
    """
    ready = []
    for model in denoisers_of(pipe_or_model).values():
        sites = list_sites(model)
        if any(resting_mixer(module) for module in model.modules()):
            raise ConvFusionError("this model is converted already: revert it first")
        chosen = _read_config(model, config)
        ready.append((model, build_mixers(model, sites, chosen), chosen.keep_attention))
    for model, mixers, keep_attention in ready:
        install(model, mixers, keep_attention=keep_attention)
    return status(pipe_or_model)


def _read_config(model: Denoiser, config: ConvertConfig | str | None) -> ConvertConfig:
    if config is None:
        config = presets.choose_preset(model)
    if isinstance(config, str) and not config.endswith(".json"):
        config = presets.get_preset(config, model)
    return checked_config(config)


def build_mixers(
    model: Denoiser, sites: list[Site], config: ConvertConfig
) -> dict[str, TokenMixer]:
    """A mixer for every chosen site, initialised from its attention.

    It has the device and the dtype that its attention computes with, and can be trained, also where
    it is built under `torch.inference_mode`.
    """
    family_of(model).check_convert(model)
    chosen = config.mixers_for(site.path for site in sites)
    check_at_hand(model, [model.get_submodule(path) for path in chosen])
    built: dict[str, TokenMixer] = {}
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # of the CPU alone
        for site in sites:
            if site.path not in chosen:
                continue
            attention = _checked_attention(model, site)
            layer = _weighty_layer(site, attention)
            weight, dtype = layer.weight, compute_dtype(model, layer)
            with torch.device("meta" if weight.is_meta else "cpu"):
                mixer = site.build(chosen[site.path])
            check_rank(site, mixer)
            mixer = mixer.to(weight.device)
            if not weight.is_meta:
                mixer.init_from(fold_gates(as_plain(attention_at(model, site))))
            built[site.path] = mixer.to(dtype)
    return built


def check_rank(site: Site, mixer: TokenMixer) -> None:
    """Refuse a mixer that does not work on grids of a site's rank.

    Raises:
        ConvFusionError: it works on grids of other ranks.
    """
    if site.rank in mixer.ranks:
        return
    grids = {2: "(height, width)", 3: "(frames, height, width)"}
    known = " or ".join(grids.get(rank, str(rank)) for rank in mixer.ranks)
    raise ConvFusionError(
        f"{site.path} has tokens on a grid of {grids.get(site.rank, site.rank)}, and "
        f"{type(mixer.config).__name__} mixes on {known}: choose another mixer for this site"
    )


def install(model: Denoiser, mixers: dict[str, TokenMixer], *, keep_attention: bool) -> None:
    """Put ready mixers, by site path, into an unconverted denoiser."""
    for site in list_sites(model):
        if site.path in mixers:
            attention = model.get_submodule(site.path)
            put_mixer(attention, mixers[site.path], site.path, site.joint)
            if not keep_attention and site.joint is None:
                _drop(attention)
    _connect(model)


def drop_attention(pipe_or_model: Any) -> Status:
    """Free the replaced attention weights of a converted model, for deployment.

    Where text and image share an attention, its weights are all in use, and stay. What stops
    working is `LOST_WITHOUT_ATTENTION`; it says so when tried.
    """
    mixed = [
        model.get_submodule(site.path)
        for model in denoisers_of(pipe_or_model).values()
        for site in list_sites(model)
        if _is_converted(model, site)
    ]
    if not mixed:
        raise ConvFusionError("this model is not converted: there is no attention to drop")
    for attention in mixed:
        if attention.layout is None:
            _drop(attention)
    return status(pipe_or_model)


def revert(pipe_or_model: Any) -> Status:
    """Undo `convert`, bit for bit: the attention takes its place again, the mixers are gone.

    What another library has replaced since then stays as it is now.

    Raises:
        ConvFusionError: the model is not converted, or its attention was dropped. Nothing is
            changed.
    """
    models = list(denoisers_of(pipe_or_model).values())
    mixed = [module for m in models for module in m.modules() if resting_mixer(module) is not None]
    if not mixed and not any(hasattr(model, "_convfusion_hooks") for model in models):
        raise ConvFusionError("this model is not converted: there is nothing to revert")
    if any(isinstance(attention, DroppedAttention) for attention in mixed):
        raise ConvFusionError(
            "the attention weights of this model were dropped: load the original model again"
        )
    for model in models:
        _disconnect(model)
    for attention in mixed:
        del attention.mixer, attention.site
        vars(attention).pop("layout", None)
        if isinstance(attention, MixedAttention):  # not, while `attention_back` lets it stand
            attention.__class__ = attention.stock  # type: ignore[assignment]
    return status(pipe_or_model)


def status(pipe_or_model: Any) -> Status:
    """What stands at each self-attention site of a pipeline or denoiser."""
    first, *others = denoisers_of(pipe_or_model).items()
    further = {name: status(model) for name, model in others}
    _, model = first
    rows = []
    for site in family_of(model).list_sites(model):  # of which another library may have left none
        attention = model.get_submodule(site.path)
        mixer = attention.mixer if _is_converted(model, site) else None
        mixer_weights = sum(p.numel() for p in mixer.parameters()) if mixer is not None else 0
        replaced = {} if site.joint else replaced_layers(attention)
        weights = sum(p.numel() for layer in replaced.values() for p in layer.parameters())
        rows.append(
            SiteStatus(
                site=site,
                mixer=mixer.config if mixer is not None else None,
                attention_kept=not isinstance(attention, DroppedAttention),
                attention_parameters=weights,
                mixer_parameters=mixer_weights,
                record=record_of(attention.mixer) if mixer is not None else None,
            )
        )
    return Status(type(model).__name__, family_of(model).name, tuple(rows), further)


def mixers_of(pipe_or_model: Any) -> dict[str, TokenMixer]:
    """The mixers of a converted denoiser, a pipeline's first, by path; empty if there are none."""
    model = denoiser_of(pipe_or_model)
    return {
        site.path: model.get_submodule(site.path).mixer
        for site in family_of(model).list_sites(model)
        if _is_converted(model, site)
    }


@contextmanager
def attention_back(pipe_or_model: Any, paths: Iterable[str]) -> Iterator[None]:
    """Let the attention stand in for its mixer at some converted sites, for a while.

    What is computed then is, bit for bit, what a model computes that was not converted there. The
    mixers wait, and `mixers_of` and `status` leave them out.

    Raises:
        ConvFusionError: a path is no converted site, or its attention was dropped. Nothing is
            changed.
    """
    model, paths = denoiser_of(pipe_or_model), set(paths)
    if unknown := paths - mixers_of(model).keys():
        raise ConvFusionError(f"{min(unknown)} is no converted site of this model")
    resting = [model.get_submodule(path) for path in sorted(paths)]
    if any(isinstance(attention, DroppedAttention) for attention in resting):
        raise ConvFusionError("the attention weights of this model were dropped")
    hooks = []
    try:
        for attention in resting:
            attention.__class__ = attention.stock
            hooks.append(attention.register_forward_pre_hook(drop_grid, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attention in resting:
            if resting_mixer(attention) is not None:  # it was not reverted inside
                attention.__class__ = mixed_class(type(attention))


def _is_converted(model: Denoiser, site: Site) -> bool:
    return isinstance(model.get_submodule(site.path), MixedAttention)


def _weighty_layer(site: Site, attention: Any) -> Any:
    """A layer of an attention whose weight tells device and dtype.

    Where text and image share the attention its projections may be quantised, but not its norms.
    """
    if site.joint is None:
        return unwrapped(projections(attention)[2])
    layers = [each for each in attention.modules() if hasattr(each, "weight")]
    floating = [each for each in layers if each.weight is not None and each.weight.dtype in FLOATS]
    return (floating or layers)[-1]


def _checked_attention(model: Denoiser, site: Site) -> Any:
    attention: Any = model.get_submodule(site.path)
    family = family_of(model)
    plain = family.attention_classes
    skips = getattr(attention, "residual_connection", False)
    spatial = getattr(attention, "spatial_norm", None) is not None
    if type(attention) not in plain or skips != family.mixes_maps or spatial:
        names = " or ".join(kind.__name__ for kind in plain)
        raise UnsupportedModelError(
            f"{site.path} is a {type(attention).__name__}, not a plain diffusers {names}"
        )
    check_forward(site.path, attention)
    if site.joint is not None:
        check_joint(site.path, site.joint, attention)
        return attention
    check_projections(site.path, attention)
    check_processor(site.path, getattr(attention, "processor", None))
    return attention


def _drop(attention: Any) -> None:
    for name in replaced_layers(attention):
        delattr(attention, name)
    if not isinstance(attention, DroppedAttention):
        attention.__class__ = mixed_class(attention.stock, dropped=True)


def _connect(model: Denoiser) -> None:
    _disconnect(model)  # what is left where another library has replaced every site
    guard(model)
    model._convfusion_sites = tuple(mixers_of(model))
    carrier = family_of(model).carrier(model)
    reached = sorted({s.owner for s in list_sites(model) if _is_converted(model, s)})
    owners = [model.get_submodule(path) for path in reached]
    model._convfusion_hooks = [
        model.register_forward_pre_hook(watch_plugins, with_kwargs=True),
        *(carrier.attach(owner) for owner in owners),
        *(
            attention.register_forward_pre_hook(drop_grid, with_kwargs=True)
            for attention in _list_unconverted(owners)
        ),
    ]


def _list_unconverted(owners: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The attentions in reach of a grid that have no use for one."""
    for owner in owners:
        for module in owner.modules():
            kinds = (Attention, AttentionModuleMixin)
            if isinstance(module, kinds) and not isinstance(module, MixedAttention):
                yield module


def _disconnect(model: Denoiser) -> None:
    if hasattr(model, "_convfusion_hooks"):
        unguard(model)
        for handle in model._convfusion_hooks:
            handle.remove()
        del model._convfusion_hooks, model._convfusion_sites


def check_teachable(student: Denoiser) -> None:
    """Raise a ConvFusionError unless a converted model still has the attention to learn from."""
    if not mixers_of(student):
        raise ConvFusionError("this model is not converted: convert it before distilling")
    if not all(site.attention_kept for site in status(student).sites):
        raise ConvFusionError(
            "the attention of this model was dropped, so there is nothing to learn from: distil "
            "the model that it was converted from"
        )
    check_unhooked(student)


def attention_teacher(student: Denoiser) -> Denoiser:
    """The model as it was before its conversion, sharing every weight with the student.

    A copy of the module tree whose parameters and buffers are the student's own, without what other
    libraries put on its modules, then reverted: it costs no memory for weights, and stays right
    while the student's graph is in flight.

    Raises:
        ConvFusionError: the student is not converted, its attention was dropped, or its weights
            need a hook to be computed with.
    """
    check_teachable(student)
    shared = {id(t): t for t in (*student.parameters(), *student.buffers())}
    teacher = copied_without_patches(student, shared)
    revert(teacher)
    return teacher.eval()
