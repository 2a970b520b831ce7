"""A whole converted pipeline on disk: diffusers' layout, with the blocks in a folder of their own.

What is read is checked before anything is built: no code, nothing outside of the folder, no more
memory than the weight files account for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from convfusion.checkpoint import saving
from convfusion.checkpoint.blocks import check_saveable, load, save
from convfusion.checkpoint.loading import (
    INDEX,
    build,
    check_folder,
    denoiser_class,
    in_dtype,
    read_pipeline,
)
from convfusion.checkpoint.named import MANIFEST
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.families import Denoiser, check_alone, component_names, denoiser_of
from convfusion.files import (
    few,
    read_header,
    read_json,
    read_tensors,
    share_files,
    write_tensors,
    write_text,
)
from convfusion.folders import (
    check_only,
    exchange,
    made_folder,
    remove_remains,
    scratch_folder,
    unwritable,
)
from convfusion.surgery import mixers_of, status

OURS = "convfusion"  # the folder within a pipeline's that has the blocks
FILES = "files.json"  # beside them: what `save_pipeline` wrote, all of which it may replace
BARE = "model_without_attention.safetensors"  # a name that no stock loader looks for


def save_pipeline(pipe: Any, folder: str | Path) -> None:
    """Write a whole converted pipeline, to be read back with `load_pipeline`.

    The folder has diffusers' layout, and the blocks in `convfusion/`. Where the attention was
    kept, diffusers' own `from_pretrained` reads it as the base model; where it was dropped, that
    fails with a missing file instead of drawing with attention that was never trained.

    Args:
        pipe: converted.
        folder: a new or empty one, or one that holds a pipeline that this function wrote, which is
            replaced in the end. A link to a folder stays one.

    Raises:
        ConvFusionError: the folder holds something else, or the pipeline has something that could
            not be read back, such as a LoRA. Nothing is written.
        CheckpointError: it cannot be written, as on a full disk. What was there is still there.
    """
    check_alone(pipe, "whole saved pipelines")
    model = denoiser_of(pipe)
    name = _component(pipe, model)
    check_saveable(pipe)
    apart = tuple(f"{path}.mixer." for path in mixers_of(model))
    apart += tuple(f"{row.site.path}." for row in status(model).sites if not row.attention_kept)
    for part, component in pipe.components.items():
        saving.check_component(part, component, apart if component is model else ())
    folder = Path(folder)
    _check_place(folder)
    with made_folder(folder) as place, scratch_folder(place) as aside:
        remove_remains(place)
        try:
            _write(pipe, model, name, aside)
            check_folder(aside)  # as `load_pipeline` will
            _check_place(place)  # again: that took its time
            exchange(aside, place, _rank)
        except ConvFusionError as error:  # which calls the files by their later names
            raise type(error)(str(error).replace(str(aside), str(folder))) from None
        except Exception as error:  # of the many that libraries have for a full disk
            raise unwritable(folder, error) from error


def load_pipeline(folder: str | Path, **options: Any) -> Any:
    """Read back what `save_pipeline` wrote: a pipeline that draws the same images bit for bit.

    Args:
        folder: on disk.
        options: for diffusers' `DiffusionPipeline.from_pretrained`, such as `dtype`. Without
            that, everything is loaded in float32.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / OURS / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is no converted pipeline: it has no {OURS}/{MANIFEST}")
    check_folder(folder)
    bare = next(iter(sorted(folder.glob(f"*/{BARE}"))), None)
    if not options.keys() & {"dtype", "torch_dtype"}:
        options |= in_dtype(torch.float32)
    if bare is not None:
        name = bare.parent.name
        dtype = options.get("dtype") or options.get("torch_dtype")
        if isinstance(dtype, dict):
            dtype = dtype.get(name, dtype.get("default", torch.float32))
        options[name] = _load_bare(bare, folder / OURS).to(dtype)
    pipe = read_pipeline(folder, **options)
    if bare is None:
        load(pipe, folder / OURS)
    return pipe


def _write(pipe: Any, model: Denoiser, name: str, aside: Path) -> None:
    """All files of a pipeline, the denoiser's weights apart from its blocks."""
    bare = any(not site.attention_kept for site in status(model).sites)
    weights = BARE if bare else "diffusion_pytorch_model.safetensors"
    save(pipe, aside / OURS)
    pipe.save_config(aside)
    _write_labels(pipe, aside / INDEX)
    for part, component in pipe.components.items():
        if component is model:
            model.save_config(aside / name)
            stock, _ = _parted(model)
            write_tensors(aside / name / weights, {k: v.contiguous() for k, v in stock.items()})
        elif component is not None:
            component.save_pretrained(aside / part)
    files = [path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()]
    record = sorted([*files, f"{OURS}/{FILES}"])
    write_text(aside / OURS / FILES, json.dumps(record, indent=2) + "\n")
    share_files(aside)


def _check_place(folder: Path) -> None:
    """Refuse a folder that holds anything that `save_pipeline` did not write."""
    place = folder.resolve()
    record = read_json(place / OURS / FILES) if (place / OURS / FILES).is_file() else []
    named = {str(name) for name in record} if isinstance(record, list) else set()
    why = "save_pipeline replaces a pipeline that it wrote and nothing else; name another folder"
    check_only(place, named, why)


def _rank(name: str) -> int:
    """The order in which a pipeline leaves a folder; it arrives in the opposite one.

    Without its index it is no pipeline for anybody, and with the record it can be replaced.
    """
    return {INDEX: 0, OURS: 2}.get(name, 1)


def _write_labels(pipe: Any, index: Path) -> None:
    """Note the names of a DiT's classes, which diffusers reads and does not write."""
    names: dict[int, list[str]] = {}
    for name, label in getattr(pipe, "labels", {}).items():
        names.setdefault(label, []).append(name)
    if names:
        told = {str(label): ", ".join(synonyms) for label, synonyms in sorted(names.items())}
        write_text(index, json.dumps(read_json(index) | {"id2label": told}, indent=2) + "\n")


def _load_bare(weights: Path, blocks: Path) -> nn.Module:
    """A converted denoiser without attention, from its config and the two weight files."""
    kind, config = denoiser_class(weights.parent)
    _check_shapes(weights)
    with init_empty_weights(include_buffers=False):  # buffers that no file holds stay real
        model = build(kind, config, weights.with_name("config.json"))
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


def _check_shapes(weights: Path) -> None:
    """Refuse a denoiser whose config and weight file are not of one size, building neither."""
    kind, config = denoiser_class(weights.parent)
    with torch.device("meta"):
        planned = build(kind, config, weights.with_name("config.json")).state_dict()
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
