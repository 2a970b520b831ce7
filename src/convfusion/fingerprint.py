"""What names a model: results, caches and runs say by it what their numbers rest on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Of the configs of transformers: what they note, and what changes no number outside training.
IDLE = {"architectures", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
IDLE |= {"id2label", "label2id", "problem_type", "use_cache", "return_dict", "is_encoder_decoder"}
IDLE |= {"dropout", "dropout_rate", "attention_dropout", "initializer_range", "initializer_factor"}
TOKENIZING = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map")
PASSING = ("padding", "truncation")  # in a tokenizer: of its last call
NAMED = 3  # differences inside a part that a message names


def fingerprint(*modules: nn.Module, without: str | None = None) -> str:
    """The first 16 hex digits of SHA-256 over names, dtypes, shapes and values of every tensor.

    Equal weights have equal fingerprints on every device; another dtype has another one.

    Args:
        modules: in this order.
        without: leave out tensors with this in their name.

    Raises:
        NotImplementedError: a tensor is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if without is not None and without in name:
                continue
            _add(digest, name, tensor)
    return digest.hexdigest()[:16]


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _add(digest, name, tensor)
    return digest.hexdigest()[:16]


def tensor_fingerprint(tensor: Tensor) -> str:
    """The same of one tensor alone."""
    digest = hashlib.sha256()
    _add(digest, "", tensor)
    return digest.hexdigest()[:16]


def identity(pipe: Any) -> dict[str, Any]:
    """What latents, pictures and conditioning of a pipeline rest on beside its denoiser, for JSON.

    Returns:
        By part, such as `vae` or `text encoder 2`, its weights and settings; None for a part that
        pipelines of this class have and this one was loaded without.
    """
    parts: dict[str, Any] = {}
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if hasattr(pipe, name):
            parts[name] = module_identity(getattr(pipe, name))
    if parts.get("vae"):
        parts["vae"].pop("sample_size", None)  # of its training: no number depends on it
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if hasattr(pipe, name):
            parts[name] = _tokenizer_identity(getattr(pipe, name))
    if labels := getattr(pipe, "labels", None):  # the class names of a DiT
        parts["class_names"] = {"digest": digest_of_json(labels)}
    if "force_zeros_for_empty_prompt" in pipe.config:  # SDXL
        zeros = pipe.config["force_zeros_for_empty_prompt"]
        parts["empty_prompt"] = {"force_zeros": bool(zeros)}
    return {name.replace("_", " "): part for name, part in parts.items()}


def module_identity(module: nn.Module | None) -> dict[str, Any] | None:
    """Weights and settings of a model, for JSON; None of None."""
    if module is None:
        return None
    return {"weights": fingerprint(module), **module_settings(module)}


def module_settings(module: nn.Module) -> dict[str, Any]:
    """What a model computes with beside its weights: class, config and adapters that are on."""
    config: Any = getattr(module, "config", {})
    told = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    facts: dict[str, Any] = {"class": type(module).__name__}
    if adapters := _adapters(module):
        facts["adapters"] = digest_of_json(adapters)
    return facts | _plain({k: v for k, v in told.items() if k[0] != "_" and k not in IDLE})


def scheduler_identity(scheduler: Any) -> dict[str, Any]:
    """Class and settings of a scheduler, for JSON."""
    told = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    levels = getattr(scheduler, "alphas_cumprod", None)  # which may be set to others
    if isinstance(levels, Tensor):
        told["noise_levels"] = tensor_fingerprint(levels)
    return {"class": type(scheduler).__name__, **_plain(told)}


def differences(
    held: Any, found: Mapping[str, Any], words: tuple[str, str] = ("then", "now")
) -> list[str]:
    """What differs of what was noted and what is here, each with both values, in words.

    Args:
        held: as it was noted; a file that is damaged may say anything.
        found: as it is now. A part that is None here is not known, and not compared.
        words: that stand behind the two values.
    """

    def both(before: Any, here: Any) -> str:
        return f"{shown(before)} {words[0]}, {shown(here)} {words[1]}"

    told = []
    held = held if isinstance(held, dict) else {}
    for name, here in _plain(found).items():
        before = held.get(name)
        if here is None or before == here:
            continue
        if not isinstance(here, dict) or not isinstance(before, dict):
            told.append(f"{name} ({both(before, here)})")
            continue
        changed = [k for k in {**before, **here} if here.get(k) != before.get(k)]
        if not changed:
            continue
        pairs = [f"{key} {both(before.get(key), here.get(key))}" for key in changed[:NAMED]]
        rest = f"; and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        told.append(f"{name} ({'; '.join(pairs)}{rest})")
    return told


def _tokenizer_identity(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        words = {k: v for k, v in json.loads(backend.to_str()).items() if k not in PASSING}
    else:
        words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    told = {name: getattr(tokenizer, name, None) for name in TOKENIZING}
    return {"class": type(tokenizer).__name__, "words": digest_of_json(words), **_plain(told)}


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    values = tensor.detach().cpu().contiguous().reshape(-1)
    content: Any = values.view(torch.uint8).numpy()
    digest.update(memoryview(content))


def _adapters(module: nn.Module) -> list[Any]:
    """The low-rank adapters that are switched on, with their strengths."""
    return [
        (name, sorted(each.active_adapters), dict(each.scaling))
        for name, each in module.named_modules()
        if hasattr(each, "active_adapters")
        and isinstance(getattr(each, "scaling", None), dict)
        and not getattr(each, "disable_adapters", False)
    ]


def digest_of_json(value: Any) -> str:
    """16 hex digits of a value as JSON; what JSON does not know counts by its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dict(value), sort_keys=True, default=str))


def shown(value: Any) -> str:
    """A value from JSON in a message: short, None as `none`."""
    text = "none" if value is None else json.dumps(value).strip('"')
    return text if len(text) <= 40 else f"{text[:39]}…"
