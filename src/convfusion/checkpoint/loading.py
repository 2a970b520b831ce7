"""Pipelines in diffusers' layout, read from a folder: checked first, and whole or not at all.

diffusers and transformers fill a weight that a file lacks with random numbers and say so in a log.
Here that is an error, as is everything else that they raise over a damaged file.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from convfusion.errors import CheckpointError, UnsupportedModelError, first_line
from convfusion.families import component_names, supported_classes
from convfusion.files import few, read_header, read_json

INDEX = "model_index.json"
CONFIGS = ("config.json", "scheduler_config.json")  # what modules and tables are built from
MOST_LAYERS, MOST_LATENTS, MOST = 1024, 1024, 2**20  # that a config may ask for; else, any number
IDLE = ("position_ids", "y_embedding")  # ends of names that published files have and no model uses
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"})
ELSEWHERE = ("device_map", "quantization_config")  # options that only diffusers itself can follow


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of diffusers' `from_pretrained` that loads a pipeline in a dtype.

    It is `dtype` from 0.40 on, which warns of its old name.
    """
    from diffusers import __version__

    return {"dtype" if TorchVersion(__version__) >= "0.40" else "torch_dtype": dtype}


def read_pipeline(folder: Path, **options: Any) -> Any:
    """A pipeline from a folder in diffusers' layout, of safetensors and JSON alone.

    Where a component has its weights as a variant only (`*.fp16.safetensors`), that is taken.

    Args:
        folder: on disk.
        options: for `DiffusionPipeline.from_pretrained`: `dtype`, components that take the place
            of those in the folder, and the like.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor or has one too many.
        UnsupportedModelError: the denoiser is of a class that cannot be converted.
    """
    from diffusers import DiffusionPipeline

    components = check_folder(folder)
    dtypes = options.get("dtype", options.get("torch_dtype"))
    variant = options.pop("variant", None)
    parts: dict[str, Any] = {}
    for name, kind in components.items():
        if kind is not None and name not in options:
            dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
            parts[name] = read_part(folder / name, kind, dtype or torch.float32, variant)
    options = _left_out(folder / INDEX) | options
    if options.keys() & set(ELSEWHERE):  # what was read has been checked, and is read again
        parts, options["variant"] = {}, variant
    try:
        return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **parts, **options)
    except Exception as error:
        raise _damaged(folder / INDEX, error) from error


def _left_out(index: Path) -> dict[str, None]:
    """Components that a pipeline has none of and that diffusers must be told so: SD3's T5."""
    import diffusers

    facts = read_json(index)
    optional = getattr(diffusers, facts["_class_name"])._optional_components
    nothing = (k for k, part in facts.items() if isinstance(part, list) and part[:1] == [None])
    return dict.fromkeys(name for name in nothing if name not in optional)


def read_part(folder: Path, kind: Any, dtype: torch.dtype, variant: str | None = None) -> Any:
    """A component of a pipeline, from its folder.

    Args:
        folder: of the component.
        kind: its class, of diffusers or transformers.
        dtype: of its weights.
        variant: of its weights, where they have it.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder.parent} lacks the folder {folder.name} of its {INDEX}")
    options: dict[str, Any] = {"local_files_only": True}
    weights = None
    if issubclass(kind, nn.Module):
        ours = kind.__module__.startswith("diffusers.models.")
        variant = find_variant(folder, _stem(kind), variant)
        weights = _weights(folder, _stem(kind), variant)
        options |= in_dtype(dtype) if ours else {"dtype": dtype}
        options |= {"use_safetensors": True, "variant": variant, "output_loading_info": True}
    try:
        loaded = kind.from_pretrained(folder, **options)
    except Exception as error:
        raise _damaged(_config_of(folder), error) from error
    if weights is None:
        return loaded
    part, told = loaded
    _check_filled(weights, told)
    return part


def find_variant(folder: Path, stem: str, wanted: str | None = None) -> str | None:
    """The variant that a component has its safetensors weights in; None for the plain ones.

    Args:
        folder: of the component.
        stem: how its weight files begin.
        wanted: taken if it is there.

    Raises:
        CheckpointError: there are none, only pickled ones, or several variants and no plain ones.
    """
    names = [path.name for path in folder.iterdir()]
    shard = r"(?:-\d{5}-of-\d{5})?"
    pattern = re.compile(
        rf"{stem}(?:\.(?P<one>\w+?))?{shard}\.safetensors"
        rf"|{stem}\.safetensors\.index(?:\.(?P<many>\w+))?\.json"
    )
    stored = {match["one"] or match["many"] for name in names if (match := pattern.fullmatch(name))}
    if wanted in stored:
        return wanted
    if None in stored:
        return None
    if len(stored) == 1:
        return stored.pop()
    if stored:
        raise CheckpointError(
            f"{folder} has its weights in the variants {few(stored)} and not in plain form: leave "
            "the files of one variant there"
        )
    if pickles := sorted(name for name in names if Path(name).suffix in PICKLES):
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read, and there is "
            "no safetensors file beside it: if you trust it, load it with diffusers and write it "
            "with pipe.save_pretrained(folder)"
        )
    raise CheckpointError(f"{folder} has no weights: {stem}.safetensors is missing")


def check_folder(folder: Path) -> dict[str, Any]:
    """Look at everything in a pipeline's folder that is small, before anything is built.

    Returns:
        The classes of its components by name; None for one that diffusers finds by itself.

    Raises:
        CheckpointError: it brings code along, names what lies outside, has a damaged file, or asks
            for more than any model has.
        UnsupportedModelError: the denoiser is of a class that cannot be converted.
    """
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} is no pipeline: it has no {INDEX}")
    index = read_json(folder / INDEX)
    components = check_index(index, folder / INDEX)
    for name in components:
        place = folder / name
        if code := next(place.glob("*.py"), None):
            raise CheckpointError(f"{code} is code, which no pipeline may bring along")
        if (place / "adapter_config.json").exists():
            raise CheckpointError(f"{place} is an adapter, which has its weights elsewhere")
        for file in sorted(place.glob("*.json")):
            _check_json(file)
        for file in sorted(place.glob("*.safetensors")):
            read_header(file)
    return components


def check_index(index: Any, where: str | Path) -> dict[str, Any]:
    """Refuse a `model_index.json` with code, with names from outside, or of another family.

    Args:
        index: its content.
        where: what messages call it.

    Returns:
        The classes of the components by name; None for one that diffusers finds by itself.

    Raises:
        CheckpointError: it is none, or names something else than diffusers and transformers.
        UnsupportedModelError: the denoiser is of a class that cannot be converted.
    """
    import diffusers

    kind = index.get("_class_name") if isinstance(index, dict) else None
    known = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(known, type) and issubclass(known, diffusers.DiffusionPipeline)):
        raise CheckpointError(f"{where} names no diffusers pipeline")
    components = {}
    for name, part in index.items():
        if not isinstance(part, list):  # a setting, and no component
            continue
        library = part[0] if part else None
        ours = library in (None, "diffusers", "transformers")
        if not (name.isidentifier() and (ours or hasattr(diffusers.pipelines, str(library)))):
            raise CheckpointError(
                f"{where}: {name[:60]!r} from {str(library)[:60]!r} is no "
                "component of diffusers or transformers"
            )
        if library is not None:
            components[name] = _class_of(library, part[1] if len(part) > 1 else None)
    _check_supported(index, components, where)
    return components


def denoiser_class(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The diffusers class and the config of a component."""
    import diffusers

    config = read_json(folder / "config.json")
    named = config.get("_class_name") if isinstance(config, dict) else None
    kind = getattr(diffusers, str(named), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise CheckpointError(f"{folder}/config.json names no diffusers model")
    return kind, config


def build(kind: Any, config: Any, file: Path) -> Any:
    """A model of a diffusers class from its config; an error names the file of the config."""
    try:
        return kind.from_config(config)
    except Exception as error:
        raise _damaged(file, error) from error


def _check_supported(index: dict[str, Any], components: dict[str, Any], where: str | Path) -> None:
    """Refuse a pipeline that cannot be converted, by the class of its denoiser."""
    names = component_names()
    name = next((name for name in names if name in components), None)
    known = ", ".join(supported_classes())
    wanted = " or ".join(f"`{each}`" for each in names)
    if name is None:
        raise UnsupportedModelError(
            f"{where}: {index['_class_name']} has no {wanted}; denoisers that can be "
            f"converted are {known}"
        )
    kind = components[name]
    if kind is None or not {each.__name__ for each in kind.__mro__} & set(supported_classes()):
        raise UnsupportedModelError(
            f"{where}: its {name} is a {str(index[name][-1])[:60]}, which cannot be converted; "
            f"supported are {known}"
        )


def _class_of(library: str, name: Any) -> Any:
    """The class of a component; None if this version of the library has none of that name."""
    import diffusers

    inside = library not in ("diffusers", "transformers")
    module = getattr(diffusers.pipelines, library) if inside else importlib.import_module(library)
    kind = getattr(module, str(name), None)
    return kind if isinstance(kind, type) and hasattr(kind, "from_pretrained") else None


def _check_json(file: Path) -> None:
    """Refuse a JSON file of a component that is damaged, reaches out, or asks for too much.

    Modules and tables are built from configs before weights are looked at: a number in a file of
    a hundred bytes could take all memory, or time without end.
    """
    content = read_json(file)
    if ".index." in file.name:
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or any(Path(str(f)).name != f for f in files.values()):
            raise CheckpointError(f"{file} must name files of its own folder")
    if file.name.endswith("config.json") and not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no configuration")
    if file.name in CONFIGS:
        for name, value in content.items():
            most = MOST_LAYERS if "layers" in name else MOST
            most = MOST_LATENTS if name == "sample_size" else most
            if any(number > most for number in _numbers(file, value)):
                raise CheckpointError(f"{file}: {name[:60]!r} is beyond {most}, as no model has it")


def _numbers(file: Path, value: Any, depth: int = 0) -> list[float]:
    """All numbers in a value of a JSON file, and the lengths of its lists."""
    if depth > 20:
        raise CheckpointError(f"{file} has values in values, deeper than any configuration")
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return [len(value), *(n for each in inner for n in _numbers(file, each, depth + 1))]
    return [abs(value)] if isinstance(value, (int, float)) else []


def _check_filled(weights: Path, told: dict[str, Any]) -> None:
    """Refuse a model some of whose tensors were drawn at random, or that left some of a file."""
    if missing := told.get("missing_keys"):
        raise CheckpointError(f"{weights} lacks {few(missing)}")
    if wrong := told.get("mismatched_keys"):
        names = [each if isinstance(each, str) else each[0] for each in wrong]
        raise CheckpointError(f"{weights}: {few(names)} is of another shape than in the config")
    if extra := [key for key in told.get("unexpected_keys") or () if not key.endswith(IDLE)]:
        raise CheckpointError(f"{weights} has tensors that its config does not know: {few(extra)}")


def _stem(kind: Any) -> str:
    """How the weight files of a class begin."""
    from diffusers import ModelMixin

    return "diffusion_pytorch_model" if issubclass(kind, ModelMixin) else "model"


def _weights(folder: Path, stem: str, variant: str | None) -> Path:
    """The weight file of a component, or the index of its shards."""
    dot = f".{variant}" if variant else ""
    single = folder / f"{stem}{dot}.safetensors"
    return single if single.exists() else folder / f"{stem}.safetensors.index{dot}.json"


def _config_of(folder: Path) -> Path:
    """The file that a component is built from; its folder where there is none."""
    files = (*CONFIGS, "preprocessor_config.json", "tokenizer_config.json")
    return next((folder / name for name in files if (folder / name).is_file()), folder)


def _damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that a library cannot make anything of."""
    reason = first_line(error) or type(error).__name__
    return CheckpointError(f"{file} cannot be read: {reason}")
