"""What a pipeline's call is given beside prompts: checked first, then cut with every batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from convfusion.errors import ConvFusionError
from convfusion.families import denoiser_of, family_of

# Arguments of a call that have a name of their own here.
OURS = {
    "prompt": "prompts",
    "class_labels": "prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "generator": "seeds",
    "height": "size",
    "width": "size",
    "num_frames": "frames",
    "video_length": "frames",
}
# What some pipelines cannot draw without, though their signatures may have None for it; each with
# what may take its place.
NEEDED = {
    "image": ("image_embeds", "image_latents"),
    "mask_image": (),
    "control_image": (),
    "image_latents": (),
}
# Lists and tensors of these names go with the prompts, one each.
_PER_PROMPT = re.compile(r"(^|_)(images?|prompt(_\d)?|embeds|mask|latents|map|labels|frames)$")
_TEXT = re.compile(r"(^|_)prompt(_\d)?$")
_PICTURES = re.compile(r"(^|_)(images?|mask|map)$")  # one of which may be for every prompt
# They look alike, and are for all prompts: one for each adapter, control net, step or layer.
_WHOLE = re.compile(
    r"ip_adapter_.*|gligen_.*|input_\w+_mask|control\w*_scale|control_guidance_\w+|control_mode"
    r"|adapter_conditioning_scale|timesteps|sigmas|callback\w*|pag_applied_layers"
)


def check_call(
    pipe: Any, prompts: Any, size: Any, options: Mapping[str, Any], *, clips: bool = False
) -> None:
    """Raise a ConvFusionError unless a pipeline can be called so, for every prompt once.

    Args:
        pipe: any pipeline whose denoiser is known.
        prompts: what to draw.
        size: of the pictures, or None.
        options: further arguments of the call.
        clips: whether clips of video are drawn, and not pictures.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConvFusionError("prompts must be a list of strings, also where there is only one")
    kind, named = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    _check_kind(pipe, clips)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in named.values())
    for name in options:
        if name in OURS:
            raise ConvFusionError(f"{OURS[name]} tells the {name}: leave {name} out")
        if name not in named and not open_ended:
            raise ConvFusionError(f"a {kind} takes no {name}")
    if "self" in named and not {"prompt", "class_labels"} & named.keys():
        raise ConvFusionError(f"a {kind} takes no prompts, so it cannot draw them")
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if options.get(name, 1) != 1:
            raise ConvFusionError(
                f"one {'clip' if clips else 'picture'} is drawn for each prompt: give the prompt "
                f"again, with another seed, in place of {name}"
            )
    if not options.get("return_dict", True):
        raise ConvFusionError("pictures are returned as a list: leave return_dict out")
    if size is not None and "self" in named and not {"height", "class_labels"} & named.keys():
        raise ConvFusionError(f"a {kind} draws at the size of its pictures: leave the size out")
    _check_needed(pipe, named, options)
    _check_adapters(pipe, options)
    for name, value in options.items():
        for each in _split_by_net(pipe, name, value):
            _check_count(name, each, len(prompts))


def frames_argument(pipe: Any) -> str | None:
    """The argument of a pipeline's call that says how many frames a clip has; None: it has none."""
    named = inspect.signature(type(pipe).__call__).parameters
    return next((n for n, ours in OURS.items() if ours == "frames" and n in named), None)


def _check_kind(pipe: Any, clips: bool) -> None:
    """Raise a ConvFusionError for clips of a pipeline that draws pictures, and the reverse."""
    kind, of_videos = type(pipe).__name__, bool(family_of(denoiser_of(pipe)).frames)
    if of_videos and not clips:
        raise ConvFusionError(
            f"a {kind} draws videos, and pictures are drawn here: `convfusion generate --frames` "
            "and `convfusion.clips.generate_clips` draw clips"
        )
    if clips and not of_videos:
        raise ConvFusionError(f"a {kind} draws pictures, which have no frames")
    if clips and frames_argument(pipe) is None:
        raise ConvFusionError(f"a {kind} takes no number of frames: call it itself")


def _check_needed(pipe: Any, named: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise a ConvFusionError if a pipeline draws from more than it is given."""
    kind = type(pipe).__name__
    passed = {name for name, value in options.items() if value is not None}
    missing = [
        name for name, instead in NEEDED.items() if name in named and not passed & {name, *instead}
    ]
    if missing == ["image_latents"] and "image" in passed:
        missing = []
    missing += [
        name
        for name, parameter in named.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in {"self", *OURS, *missing, *passed}
    ]
    if missing:
        raise ConvFusionError(
            f"a {kind} draws from more than prompts: {' and '.join(missing)} must be given, as "
            "further arguments of generate in Python"
        )
    denoiser, vae = denoiser_of(pipe), getattr(pipe, "vae", None)
    latents = None
    if vae is not None:
        latents = vae.config.get("latent_channels", vae.config.get("z_dim"))  # of videos
    taken = family_of(denoiser).latent_channels(denoiser)
    known = None not in (latents, taken)
    if not NEEDED.keys() & named.keys() and known and latents != taken:
        raise ConvFusionError(
            f"this {type(denoiser).__name__} takes {taken} channels, and a "
            f"{kind} gives it the {latents} of its latents: load it with the pipeline that it was "
            "made for"
        )


def _check_adapters(pipe: Any, options: Mapping[str, Any]) -> None:
    """Raise a ConvFusionError unless there are pictures for each IP-Adapter."""
    projections = getattr(denoiser_of(pipe), "encoder_hid_proj", None)
    loaded = len(getattr(projections, "image_projection_layers", ()))
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        value = options.get(name)
        count = len(value) if isinstance(value, list) else 1
        if value is not None and count != loaded:
            raise ConvFusionError(
                f"{name} has {count}, and {loaded} IP-Adapters are loaded: give one for each "
                "adapter, which all prompts share; for others, call generate again"
            )


def cut_options(
    pipe: Any, options: Mapping[str, Any], start: int, stop: int, count: int
) -> dict[str, Any]:
    """Options of a call for some of the prompts.

    Args:
        pipe: the pipeline.
        options: for all prompts, as `check_call` found them right.
        start, stop: which prompts.
        count: of all prompts.
    """
    part = slice(start, min(stop, count))
    return {
        name: [_cut(name, each, part, count) for each in _split_by_net(pipe, name, value)]
        if _is_by_net(pipe, name, value)
        else _cut(name, value, part, count)
        for name, value in options.items()
    }


def _cut(name: str, value: Any, part: slice, count: int) -> Any:
    if isinstance(value, Mapping) and not _WHOLE.fullmatch(name):
        return {key: _cut(key, each, part, count) for key, each in value.items()}
    if isinstance(value, str) and _TEXT.search(name):  # of old, some pipelines want as many
        return [value] * (part.stop - part.start)
    value = _unpack(value)
    return value if _count(name, value, count) is None else value[part]


def _unpack(value: Any) -> Any:
    """A batch that is the only one of a list, without the list; as diffusers takes it."""
    if isinstance(value, list | tuple) and len(value) == 1 and getattr(value[0], "ndim", 0) == 4:
        return value[0]
    return value


def _count(name: str, value: Any, count: int) -> int | None:
    """For how many prompts a value is; None where it is one for all of them.

    Args:
        name: of the option.
        value: of it.
        count: of the prompts.
    """
    if _WHOLE.fullmatch(name):
        return None
    known = _PER_PROMPT.search(name) is not None
    picture = _PICTURES.search(name) is not None and not name.endswith("attention_mask")
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim == 0 or (picture and value.ndim == 2):
            return None
        if picture and value.ndim == 3 and name.endswith("image") and "mask" not in name:
            return None  # channels, height and width of one picture
        length = len(value)
    elif isinstance(value, list) or (known and isinstance(value, tuple)):
        length = len(value)
        if not known and all(isinstance(each, str | int | float) for each in value):
            return None
    else:
        return None
    if (picture and length == 1) or (not known and length != count):
        return None
    return length


def _check_count(name: str, value: Any, count: int) -> None:
    if isinstance(value, Mapping):
        return
    length = _count(name, _unpack(value), count)
    if length not in (None, count):
        raise ConvFusionError(
            f"{name} is for {length} prompts, and there are {count}: give one for each"
        )


def _is_by_net(pipe: Any, name: str, value: Any) -> bool:
    """Whether an option is a list with the pictures of each of several control nets."""
    if name not in ("image", "control_image") or not isinstance(value, list):
        return False
    if name == "image" and "control_image" in inspect.signature(type(pipe).__call__).parameters:
        return False  # that is the picture to begin from
    control, adapter = getattr(pipe, "controlnet", None), getattr(pipe, "adapter", None)
    return (
        hasattr(control, "nets")
        or hasattr(adapter, "adapters")
        or "Union" in type(control).__name__
    )


def _split_by_net(pipe: Any, name: str, value: Any) -> list[Any]:
    return value if _is_by_net(pipe, name, value) else [value]
