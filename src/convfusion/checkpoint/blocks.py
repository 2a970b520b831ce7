"""Checkpoints: the mixers of a model alone.

A checkpoint is a folder with `blocks.safetensors`, the mixers' tensors under
`<site path>.mixer.<name>`, and `convfusion.json`, the manifest:

    {"format": 1, "version": "<of convfusion>", "family": "unet", "base_model": "<name or path>",
     "sha256": "<of blocks.safetensors>", "trained": {"steps": 1000}, "started_from": "attention",
     "sites": {"<site path>": {"channels": 64, "mixer": {"kind": "delta_conv", …}}}}

`trained` is false for blocks that no training has seen, as after `convert`. The header of
`blocks.safetensors` has the same manifest without the digest, under `convfusion`, so that the file
alone can be passed on.

Only safetensors and JSON are read, so a file from outside cannot run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convfusion.checkpoint import released
from convfusion.checkpoint.loading import INDEX
from convfusion.checkpoint.manifests import (
    NOTE,
    check_digest,
    make_manifest,
    read_manifest,
    read_note,
    read_record,
)
from convfusion.checkpoint.named import BLOCKS, MANIFEST, PACKAGED, fetch_blocks
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.families import (
    Denoiser,
    block_family,
    check_alone,
    denoiser_of,
    denoisers_of,
    list_sites,
)
from convfusion.files import (
    FLOATS,
    few,
    read_header,
    read_tensors,
    write_tensors,
    write_text,
)
from convfusion.folders import made_folder, remove_remains
from convfusion.mixers import Mixer, mixer_from_dict
from convfusion.mixers.base import TokenMixer
from convfusion.surgery import Status, build_mixers, drop_attention, install, mixers_of, status
from convfusion.surgery.config import ConvertConfig
from convfusion.surgery.layers import (
    check_blocks,
    check_floats,
    check_untied,
    separate,
)
from convfusion.surgery.record import TrainingRecord, set_record

# Settings and values by site, and what they have been through.
Blocks: TypeAlias = tuple[dict[str, Mixer], dict[str, dict[str, Tensor]], TrainingRecord]


def save(pipe_or_model: Any, target: str | Path) -> None:
    """Write the mixers of a converted pipeline or denoiser to a folder, or to one file.

    Each file is written aside and renamed, the manifest last; it names the tensor file by its
    SHA-256. Other files in the folder stay. Of a pipeline with a further denoiser, such as the
    `transformer_2` of Wan 2.2, that one's go to a folder of its name inside.

    Args:
        pipe_or_model: converted.
        target: a folder, which is made if there is none; or a file whose name ends in
            `.safetensors`, as programs want it that list blocks by file.

    Raises:
        ConvFusionError: the model is not converted, or `load` would refuse what is written.
        CheckpointError: it cannot be written, as on a full disk.
    """
    folder = Path(target)
    if folder.suffix == ".safetensors" and not folder.is_dir():
        check_alone(pipe_or_model, "single files")
        check_saveable(pipe_or_model)
        mixers = mixers_of(pipe_or_model)
        notes = {NOTE: json.dumps(make_manifest(pipe_or_model, mixers))}
        write_tensors(folder, _tensors(mixers), notes)
        return
    first, *further = denoisers_of(pipe_or_model).items()
    for _, model in (first, *further):
        check_saveable(model)
    _save_folder(pipe_or_model, folder)
    for name, model in further:
        _save_folder(model, folder / name)


def _save_folder(pipe_or_model: Any, folder: Path) -> None:
    mixers = mixers_of(pipe_or_model)
    notes = {NOTE: json.dumps(make_manifest(pipe_or_model, mixers))}
    with made_folder(folder) as place:
        remove_remains(place)
        digest = write_tensors(folder / BLOCKS, _tensors(mixers), notes)
        manifest = make_manifest(pipe_or_model, mixers, digest)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def check_saveable(pipe_or_model: Any) -> None:
    """Refuse a model whose blocks `save` would write and `load` would refuse.

    Raises:
        ConvFusionError: it is not converted; or its blocks have no values, tensors that their
            settings do not ask for, a dtype that is not read, or values that are not finite.
    """
    model = denoiser_of(pipe_or_model)
    mixers = mixers_of(model)
    if not mixers:
        raise ConvFusionError("this model is not converted: there are no blocks to save")
    check_blocks(mixers)
    check_floats(mixers)
    if any(p.is_meta for mixer in mixers.values() for p in mixer.parameters()):
        raise ConvFusionError("this model is on the meta device: it has no values to save")
    tensors = _tensors(mixers)
    wanted = {path: mixer.config for path, mixer in mixers.items()}
    expected = {key: shape for key, (_, _, shape) in _expected_tensors(model, wanted).items()}
    differing = expected.keys() ^ tensors.keys()
    differing |= {k for k in expected.keys() - differing if tensors[k].shape != expected[k]}
    if differing:
        raise ConvFusionError(
            f"the blocks are not what their settings ask for, at {few(differing)}: fold in or take "
            "off what was put into them, such as a LoRA; then save"
        )
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConvFusionError(f"{key} has values that are NaN or infinite: it is not saved")


@torch.inference_mode(False)
def load(
    pipe_or_model: Any,
    source: str | Path,
    *,
    keep_attention: bool = True,
    average: bool = True,
    revision: str | None = None,
) -> Status:
    """Convert a pipeline or denoiser to what a checkpoint holds, or update a converted one.

    Everything is checked before the model is touched. Blocks take the model's dtype and device.

    Args:
        pipe_or_model: the base model as it was converted, or converted already at the same sites
            with the same settings.
        source: a folder or a `.safetensors` file written by `save`; or such a file that the paper's
            authors released (see `convfusion.checkpoint.released`). Where nothing is at that path:
            the name of blocks that come with the package, `mini` or `mini-delta`; or the name on
            the Hub, `user/name` or `user/name@revision`, of what `push` put there.
        keep_attention: as in `ConvertConfig`.
        average: of a released file that holds both, take the moving average and not the weights
            of the last step.
        revision: branch, tag or commit of a name on the Hub.

    Raises:
        CheckpointError: nothing is of that name; or a file is missing, damaged, or does not fit
            this model, which is unchanged.
    """
    path = fetch_blocks(source, revision)
    first, *further = denoisers_of(pipe_or_model).items()
    paths = [(first[1], path), *((model, path / name) for name, model in further)]
    for name, _ in further:
        if not (path / name / MANIFEST).is_file():
            raise CheckpointError(
                f"{source} has no blocks for {name}, the further denoiser of this pipeline: load "
                f"blocks into pipe.{first[0]} or pipe.{name} alone"
            )
    ready = [_ready_blocks(model, place, average) for model, place in paths]
    for (model, _), (mixers, states, record) in zip(paths, ready, strict=True):
        _put(model, mixers, states, record, keep_attention)
    return status(pipe_or_model)


def _ready_blocks(
    model: Denoiser, source: Path, average: bool
) -> tuple[dict[str, TokenMixer], dict[str, dict[str, Tensor]], TrainingRecord]:
    """Mixers for a model, new or those that it has, and what they are to be filled with."""
    wanted, states, record = _read_source(source, model, average)
    present = mixers_of(model)
    if present and {path: mixer.config for path, mixer in present.items()} != wanted:
        raise CheckpointError(
            "the model is converted otherwise than this checkpoint: revert it first"
        )
    check_blocks(present)
    check_untied(present)
    mixers = present or build_mixers(model, list_sites(model), ConvertConfig(sites=wanted))
    for path, mixer in mixers.items():
        _check_finite(source, path, mixer, states[path])
    return mixers, states, record


def _put(
    model: Denoiser,
    mixers: dict[str, TokenMixer],
    states: dict[str, dict[str, Tensor]],
    record: TrainingRecord,
    keep_attention: bool,
) -> None:
    """Fill mixers, and convert a model with them unless it has them already."""
    present = bool(mixers_of(model))
    for path, mixer in mixers.items():
        fill(mixer, states[path])
        set_record(mixer, record)
    if not present:
        for path, mixer in mixers.items():  # of a base that is frozen, they are as well
            mixer.requires_grad_(_trains(model.get_submodule(path)))
        install(model, mixers, keep_attention=keep_attention)
    elif not keep_attention:
        drop_attention(model)


def _trains(attention: Any) -> bool:
    return any(parameter.requires_grad for parameter in attention.parameters())


def fill(mixer: TokenMixer, state: dict[str, Tensor]) -> None:
    """Give a mixer its values in its own dtype; one on the meta device takes the tensors over."""
    own = mixer.state_dict()
    cast = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    mixer.load_state_dict(cast, assign=any(tensor.is_meta for tensor in own.values()))


def _tensors(mixers: dict[str, TokenMixer]) -> dict[str, Tensor]:
    return separate(
        {
            f"{path}.mixer.{name}": tensor
            for path, mixer in mixers.items()
            for name, tensor in mixer.state_dict().items()
        }
    )


def _check_finite(
    source: str | Path, path: str, mixer: TokenMixer, state: dict[str, Tensor]
) -> None:
    """Refuse values that are no numbers, or that the dtype of the model cannot hold."""
    own = mixer.state_dict()
    for name, tensor in state.items():
        dtype = own[name].dtype
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {path}.mixer.{name} has NaN or infinite values")
        if not tensor.to(dtype).isfinite().all():
            raise CheckpointError(
                f"{source}: {path}.mixer.{name} has values beyond what {dtype} can hold: load it "
                "in float32 or bfloat16"
            )


def _check_family(model: Denoiser, manifest: dict[str, Any]) -> None:
    family = block_family(model)
    if manifest.get("family") != family:
        raise CheckpointError(
            f"the checkpoint is for a {manifest.get('family')} model, and this is a {family}"
        )
    here = {site.path: site.channels for site in list_sites(model)}
    for path, site in manifest["sites"].items():
        if path not in here:
            raise CheckpointError(f"the checkpoint has a site that this model lacks: {path}")
        if here[path] != site["channels"]:
            raise CheckpointError(
                f"{path} has {here[path]} channels here and {site['channels']} in the checkpoint: "
                "it belongs to another model"
            )


def _read_source(path: Path, model: Denoiser, average: bool) -> Blocks:
    """Settings and state of every mixer of a file, ours or a released one, or a folder."""
    if path.name == BLOCKS and (path.parent / MANIFEST).is_file():
        return _read_folder(path.parent, model)
    if path.suffix == ".safetensors" and not path.is_dir():
        if (manifest := read_note(path)) is not None:
            return _read_blocks(path, manifest, path, model)
        layout = released.read_layout(path, model, average=average)
        states = released.read_states(path, layout)
        return dict(layout.mixers), states, TrainingRecord("released")
    check_folder(path)
    return _read_folder(path, model)


def check_folder(path: Path) -> None:
    """Raise a CheckpointError for a folder without blocks of its own."""
    if (path / MANIFEST).is_file():
        return
    if (path / INDEX).is_file():
        inside = path / "convfusion"
        own = f", or its blocks, {inside}" if (inside / MANIFEST).is_file() else ""
        raise CheckpointError(f"{path} is a whole pipeline, not blocks: name it as the model{own}")
    hidden = "; it hides the blocks of that name that come with ConvFusion"
    raise CheckpointError(
        f"{path} holds no trained blocks: it has no {MANIFEST}"
        f"{hidden if str(path) in PACKAGED else ''}"
    )


def _read_folder(folder: Path, model: Denoiser) -> Blocks:
    manifest = read_manifest(folder / MANIFEST)
    blocks = _read_blocks(folder / BLOCKS, manifest, folder / MANIFEST, model)
    check_digest(folder, manifest)
    return blocks


def _read_blocks(path: Path, manifest: dict[str, Any], said: Path, model: Denoiser) -> Blocks:
    """Settings and state of every mixer, checked to be complete, without extras, of right shapes.

    The shapes that the settings ask for are compared with the header of the file before anything
    is allocated, so that no more memory is taken than the file has tensors for.
    """
    _check_family(model, manifest)
    wanted = {site: mixer_from_dict(each["mixer"]) for site, each in manifest["sites"].items()}
    header, expected = read_header(path), _expected_tensors(model, wanted)
    if missing := expected.keys() - header.keys():
        raise CheckpointError(f"{path} lacks {few(missing)}")
    if extra := header.keys() - expected.keys():
        raise CheckpointError(f"{path} has tensors of no site in its manifest: {few(extra)}")
    for key, (_, _, shape) in expected.items():
        info = header[key]
        if info.shape != shape or info.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {key} has shape {info.shape}, expected {shape}"
                if info.shape != shape
                else f"{path}: {key} is {info.dtype}, expected one of {', '.join(sorted(FLOATS))}"
            )
    tensors = read_tensors(path)
    states: dict[str, dict[str, Tensor]] = {site: {} for site in wanted}
    for key, (site, name, _) in expected.items():
        states[site][name] = tensors[key]
    return wanted, states, read_record(said, manifest)


def _expected_tensors(
    model: Denoiser, wanted: dict[str, Mixer]
) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Site, name within its mixer and shape of every tensor of a checkpoint, by its full name."""
    expected = {}
    for site in list_sites(model):
        if site.path in wanted:
            with torch.device("meta"):
                mixer = site.build(wanted[site.path])
            for name, tensor in mixer.state_dict().items():
                expected[f"{site.path}.mixer.{name}"] = (site.path, name, tuple(tensor.shape))
    return expected
