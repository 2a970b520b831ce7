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
import re
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convfusion.checkpoint import released
from convfusion.checkpoint.named import BLOCKS, MANIFEST, PACKAGED, fetch_blocks
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.families import Denoiser, block_family, denoiser_of, list_sites
from convfusion.files import (
    FLOATS,
    few,
    file_digest,
    read_header,
    read_json,
    read_notes,
    read_tensors,
    unreadable,
    write_tensors,
    write_text,
)
from convfusion.folders import made_folder, remove_remains
from convfusion.mixers import Mixer, mixer_from_dict, mixer_to_dict
from convfusion.mixers.base import TokenMixer
from convfusion.surgery import Status, build_mixers, drop_attention, install, mixers_of, status
from convfusion.surgery.config import ConvertConfig
from convfusion.surgery.layers import (
    check_blocks,
    check_floats,
    check_untied,
    projections,
    separate,
)
from convfusion.surgery.record import TrainingRecord, joint_record, set_record

# Settings and values by site, and what they have been through.
Blocks: TypeAlias = tuple[dict[str, Mixer], dict[str, dict[str, Tensor]], TrainingRecord]

FORMAT = 1
NOTE = "convfusion"  # in the header of the tensors: the manifest


def save(pipe_or_model: Any, target: str | Path) -> None:
    """Write the mixers of a converted pipeline or denoiser to a folder, or to one file.

    Each file is written aside and renamed, the manifest last; it names the tensor file by its
    SHA-256. Other files in the folder stay.

    Args:
        pipe_or_model: converted.
        target: a folder, which is made if there is none; or a file whose name ends in
            `.safetensors`, as programs want it that list blocks by file.

    Raises:
        ConvFusionError: the model is not converted, or `load` would refuse what is written.
        CheckpointError: it cannot be written, as on a full disk.
    """
    check_saveable(pipe_or_model)
    mixers = mixers_of(pipe_or_model)
    folder = Path(target)
    notes = {NOTE: json.dumps(_manifest(pipe_or_model, mixers))}
    if folder.suffix == ".safetensors" and not folder.is_dir():
        write_tensors(folder, _tensors(mixers), notes)
        return
    with made_folder(folder) as place:
        remove_remains(place)
        digest = write_tensors(folder / BLOCKS, _tensors(mixers), notes)
        manifest = _manifest(pipe_or_model, mixers, digest)
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
    model = denoiser_of(pipe_or_model)
    wanted, states, record = _read_source(fetch_blocks(source, revision), model, average)
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
    for path, mixer in mixers.items():
        fill(mixer, states[path])
        set_record(mixer, record)
    if not present:
        for path, mixer in mixers.items():  # of a base that is frozen, they are as well
            mixer.requires_grad_(_trains_values(model.get_submodule(path)))
        install(model, mixers, keep_attention=keep_attention)
    elif not keep_attention:
        drop_attention(model)
    return status(model)


def _trains_values(attention: Any) -> bool:
    return projections(attention)[2].weight.requires_grad


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


def _manifest(
    pipe_or_model: Any, mixers: dict[str, TokenMixer], digest: str | None = None
) -> dict[str, Any]:
    from convfusion import __version__

    model = denoiser_of(pipe_or_model)
    named = str(getattr(pipe_or_model.config, "_name_or_path", "") or "")
    channels = {site.path: site.channels for site in list_sites(model)}
    return {
        "format": FORMAT,
        "version": __version__,
        "family": block_family(model),
        "base_model": public_name(named),
        **({} if digest is None else {"sha256": digest}),
        **joint_record(mixers.values()).to_dict(),
        "sites": {
            path: {"channels": channels[path], "mixer": mixer_to_dict(mixer.config)}
            for path, mixer in mixers.items()
        },
    }


def public_name(name: str) -> str:
    """A Hub name, also out of a cache path; of any other path only its last part."""
    cached = re.search(r"models--(.+?)--([^/\\\\]+)", name)
    if cached:
        return "/".join(cached.groups())
    path = Path(name)
    local = path.is_absolute() or name.startswith(".") or path.exists() or len(path.parts) > 2
    return path.name if local else name


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of blocks, as far as it can be checked without their model.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    return _checked_manifest(path, read_json(path))


def _read_note(path: Path) -> dict[str, Any] | None:
    """The manifest in the header of a file that `save` wrote; None for another file."""
    note = read_notes(path).get(NOTE)
    if note is None:
        return None
    try:
        manifest = json.loads(note)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    return _checked_manifest(path, manifest)


def _checked_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of format {FORMAT}")
    sites = manifest.get("sites")
    if not isinstance(sites, dict) or not all(
        isinstance(site, dict) and {"channels", "mixer"} <= site.keys() for site in sites.values()
    ):
        raise CheckpointError(f"{path}: `sites` must map paths to channels and mixers")
    _read_record(path, manifest)
    return manifest


def _read_record(path: Path, manifest: dict[str, Any]) -> TrainingRecord:
    """What blocks have been through, as their manifest says."""
    try:
        return TrainingRecord.from_dict(manifest)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error} does not say whether the blocks are trained, as "
            '`"trained": {"steps": 1000}` or `"trained": false` would'
        ) from None


def check_digest(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse tensors that are not those that the manifest was written for."""
    if manifest.get("sha256") != file_digest(folder / BLOCKS):
        raise CheckpointError(
            f"{folder / BLOCKS} is not the file that {MANIFEST} beside it was written for: it is "
            "damaged, or the writing of it was cut short; save it again"
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
        if (manifest := _read_note(path)) is not None:
            return _read_blocks(path, manifest, path, model)
        layout = released.read_layout(path, model, average=average)
        states = released.read_states(path, layout)
        return dict(layout.mixers), states, TrainingRecord("released")
    if not (path / MANIFEST).is_file():
        hidden = "; it hides the blocks of that name that come with ConvFusion"
        raise CheckpointError(
            f"{path} holds no trained blocks: it has no {MANIFEST}"
            f"{hidden if str(path) in PACKAGED else ''}"
        )
    return _read_folder(path, model)


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
    return wanted, states, _read_record(said, manifest)


def _expected_tensors(
    model: Denoiser, wanted: dict[str, Mixer]
) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Site, name within its mixer and shape of every tensor of a checkpoint, by its full name."""
    expected = {}
    for site in list_sites(model):
        if site.path in wanted:
            with torch.device("meta"):
                mixer = wanted[site.path].build(site.channels, site.heads)
            for name, tensor in mixer.state_dict().items():
                expected[f"{site.path}.mixer.{name}"] = (site.path, name, tuple(tensor.shape))
    return expected
