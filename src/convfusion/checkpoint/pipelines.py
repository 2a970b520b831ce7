"""A whole converted pipeline on disk: diffusers' layout, with the blocks in a folder of their own.

What is read is checked before anything is built: no code, nothing outside of the folder, no more
memory than the weight files account for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from convfusion.checkpoint.blocks import MANIFEST, load, save
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.families import Denoiser, component_names, denoiser_of
from convfusion.files import (
    few,
    read_header,
    read_json,
    read_tensors,
    replace_folder,
    write_tensors,
    write_text,
)
from convfusion.surgery import mixers_of, status

BARE = "model_without_attention.safetensors"  # a name that no stock loader looks for
MOST_LAYERS, MOST_LATENTS, MOST = 1024, 1024, 2**20  # that a config may ask for; else, any number


def save_pipeline(pipe: Any, folder: str | Path) -> None:
    """Write a whole converted pipeline, to be read back with `load_pipeline`.

    The folder has diffusers' layout, and the blocks in `convfusion/`. Where the attention was
    kept, diffusers' own `from_pretrained` reads it as the base model; where it was dropped, that
    fails with a missing file instead of drawing with attention that was never trained.
    """
    model = denoiser_of(pipe)
    name = _component(pipe, model)
    if any(".base_layer." in key for key in model.state_dict()):
        raise ConvFusionError(
            "a LoRA is loaded: pipe.fuse_lora() folds it in, and pipe.unload_lora_weights() takes "
            "it off; then save"
        )
    bare = any(not site.attention_kept for site in status(model).sites)
    weights = BARE if bare else "diffusion_pytorch_model.safetensors"
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    save(pipe, aside / "convfusion")
    pipe.save_pretrained(aside, safe_serialization=True)
    _write_labels(pipe, aside / "model_index.json")
    for file in (aside / name).glob("*.safetensors*"):
        file.unlink()  # what diffusers wrote has the blocks among the stock weights
    stock, _ = _parted(model)
    write_tensors(aside / name / weights, {k: v.contiguous() for k, v in stock.items()})
    replace_folder(aside, folder)


def _write_labels(pipe: Any, index: Path) -> None:
    """Note the names of a DiT's classes, which diffusers reads and does not write."""
    names: dict[int, list[str]] = {}
    for name, label in getattr(pipe, "labels", {}).items():
        names.setdefault(label, []).append(name)
    if names:
        told = {str(label): ", ".join(found) for label, found in sorted(names.items())}
        write_text(index, json.dumps(read_json(index) | {"id2label": told}, indent=2) + "\n")


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of diffusers' `from_pretrained` that loads a pipeline in a dtype.

    It is `dtype` from 0.40 on, which warns of its old name.
    """
    from diffusers import __version__

    return {"dtype" if TorchVersion(__version__) >= "0.40" else "torch_dtype": dtype}


def load_pipeline(folder: str | Path, **options: Any) -> Any:
    """Read back what `save_pipeline` wrote: a pipeline that draws the same images bit for bit.

    Args:
        folder: on disk.
        options: for diffusers' `DiffusionPipeline.from_pretrained`, such as `dtype`. Without
            that, everything is loaded in float32.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    from diffusers import DiffusionPipeline

    folder = Path(folder)
    if not (folder / "convfusion" / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is no converted pipeline: it has no convfusion/{MANIFEST}")
    bare = next(iter(sorted(folder.glob(f"*/{BARE}"))), None)
    _check_index(folder)
    _check_configs(folder)
    if not options.keys() & {"dtype", "torch_dtype"}:
        options |= in_dtype(torch.float32)
    parts: dict[str, Any] = {}
    if bare is not None:
        name = bare.parent.name
        dtype = options.get("dtype") or options.get("torch_dtype")
        if isinstance(dtype, dict):
            dtype = dtype.get(name, dtype.get("default", torch.float32))
        parts[name] = _load_bare(bare, folder / "convfusion").to(dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **parts, **options)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    if bare is None:
        load(pipe, folder / "convfusion")
    return pipe


def _load_bare(weights: Path, blocks: Path) -> nn.Module:
    """A converted denoiser without attention, from its config and the two weight files."""
    kind, config = _denoiser_class(weights.parent)
    _check_shapes(weights)
    with init_empty_weights(include_buffers=False):  # buffers that no file holds stay real
        model = kind.from_config(config)
    load(model, blocks, keep_attention=False)
    tensors = read_tensors(weights)
    stock, trained = _parted(model)
    if wrong := stock.keys() ^ tensors.keys():
        raise CheckpointError(f"{weights} does not fit its config: {few(wrong)}")
    model.load_state_dict({**tensors, **trained}, assign=True)
    return model.eval()


def _parted(model: Denoiser) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a converted model: its stock weights, and those of its mixers."""
    mixers = tuple(f"{path}.mixer." for path in mixers_of(model))
    state = model.state_dict()
    trained = {key: value for key, value in state.items() if key.startswith(mixers)}
    return {key: value for key, value in state.items() if key not in trained}, trained


def _check_index(folder: Path) -> None:
    """Refuse a pipeline that brings code along, or names what lies outside its folder."""
    from diffusers import pipelines

    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{folder}/model_index.json names no diffusers pipeline")
    for name, part in index.items():
        if not isinstance(part, list):  # a setting, and no component
            continue
        library = part[0] if part else None
        ours = library in (None, "diffusers", "transformers") or hasattr(pipelines, str(library))
        if not (name.isidentifier() and ours):
            raise CheckpointError(
                f"{folder}/model_index.json: {name[:60]!r} from {str(library)[:60]!r} is no "
                "component of diffusers or transformers"
            )
    if code := next(folder.glob("*/*.py"), None):
        raise CheckpointError(f"{code} is code, which no pipeline may bring along")
    for shards in folder.glob("*/*.index.json"):
        weights = read_json(shards)
        files = weights.get("weight_map") if isinstance(weights, dict) else None
        if not isinstance(files, dict) or any(Path(str(f)).name != f for f in files.values()):
            raise CheckpointError(f"{shards} must name files of its own folder")


def _check_configs(folder: Path) -> None:
    """Refuse a component whose config asks for more than any model has.

    Modules and tables are built from configs before weights are looked at: a number in a file of
    a hundred bytes could take all memory, or time without end.
    """
    for file in sorted(folder.glob("*/config.json")):
        config = read_json(file)
        if not isinstance(config, dict):
            raise CheckpointError(f"{file} holds no configuration")
        for name, value in config.items():
            most = MOST_LAYERS if "layers" in name else MOST
            most = MOST_LATENTS if name == "sample_size" else most
            if any(number > most for number in _numbers(value)):
                raise CheckpointError(f"{file}: {name[:60]!r} is beyond {most}, as no model has it")


def _numbers(value: Any) -> list[float]:
    """All numbers in a value of a JSON file, and the lengths of its lists."""
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return [len(value), *(number for each in inner for number in _numbers(each))]
    return [abs(value)] if isinstance(value, (int, float)) else []


def _denoiser_class(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The diffusers class and the config of a component."""
    import diffusers

    config = read_json(folder / "config.json")
    named = config.get("_class_name") if isinstance(config, dict) else None
    kind = getattr(diffusers, str(named), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise CheckpointError(f"{folder}/config.json names no diffusers model")
    return kind, config


def _check_shapes(weights: Path) -> None:
    """Refuse a denoiser whose config and weight file are not of one size, building neither."""
    kind, config = _denoiser_class(weights.parent)
    with torch.device("meta"):
        planned = kind.from_config(config).state_dict()
    header = read_header(weights)
    wrong = header.keys() - planned.keys()
    wrong |= {k for k in header.keys() - wrong if header[k].shape != tuple(planned[k].shape)}
    if wrong:
        raise CheckpointError(f"{weights} does not fit its config: {few(wrong)}")


def _component(pipe: Any, model: Denoiser) -> str:
    for name in component_names():
        if getattr(pipe, name, None) is model:
            return name
    raise ConvFusionError("save_pipeline takes a pipeline; for a denoiser alone use save")
