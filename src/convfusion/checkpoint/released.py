"""The weights that the paper's authors released: one safetensors file with the blocks of a model.

Names there are `<group><block path>.conv1.<name>`, with diffusers' path of the transformer block:

    conv_up.weight, conv_up.bias        [C', C], [C']           our proj_in
    gates.<i>.conv_spatial.weight       [K, K, C']              our convs.<i>, [C', 1, K, K]
    gates.<i>.conv_spatial.bias         [C']                    its bias, in some files
    conv_out.weight, conv_out.bias      [C, n·C'/2], [C]        our proj_out
    conv_pool.weight, conv_pool.bias    [C, C], [C]             our mean_proj

A group is whatever stands before the path, such as `base:` (the model) and `base_ema:` (its moving
average); both may be in one file. Plain numbers, whose names end in `$int` and the like, are passed
over. Channels, kernels and stages follow from the shapes; a stage i works at scale 1/2^i. The gate
does not: it is f1·f2·√(C'/2) in the files for SD1.x and SDXL, and f1·σ(f2) in those for PixArt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from convfusion.errors import CheckpointError
from convfusion.families import Denoiser, Site, family_of, list_sites
from convfusion.files import FLOATS, TensorInfo, few, read_header, read_some
from convfusion.mixers.delta_conv import DeltaConv, Gate
from convfusion.surgery import presets

Shape = tuple[int, ...]

LAYERS = {"conv_up": "proj_in", "conv_out": "proj_out", "conv_pool": "mean_proj"}

_BLOCK = r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
_NAME = re.compile(
    rf"(?P<group>|.*?[:.])(?P<block>{_BLOCK}|transformer_blocks\.\d+)\.conv1\.(?P<name>.+)"
)
_NUMBER = re.compile(r".*\$(?:int|float|bool)")
_KERNEL = re.compile(r"gates\.(\d{1,3})\.conv_spatial\.(weight|bias)")


@dataclass(frozen=True)
class Layout:
    """What a released file holds for a model.

    Attributes:
        mixers: settings of each site's block, by the path of the site.
        names: for each site, its tensors' names in the file, by their names in our block.
    """

    mixers: dict[str, DeltaConv]
    names: dict[str, dict[str, str]]


def read_layout(path: Path, model: Denoiser, *, average: bool = True) -> Layout:
    """Find the blocks of a model in a released file, from its header alone.

    Args:
        path: of a safetensors file.
        model: the denoiser that they are for, of the layout of SD1.x, SDXL or PixArt.
        average: take the moving average, where there is one, or the weights as they were last.

    Raises:
        CheckpointError: the file is damaged, not one of theirs, or not for this model: a tensor is
            missing, too much, or of another shape.
    """
    gate = _gate(model)
    header = read_header(path)
    sites = {site.block: site for site in list_sites(model)}
    held = _blocks(path, header, average)
    if foreign := held.keys() - sites.keys():
        raise CheckpointError(f"{path} has blocks that this model lacks: {few(foreign)}")
    if missing := sites.keys() - held.keys():
        raise CheckpointError(f"{path} lacks the blocks of {few(missing)}")
    layout = Layout({}, {})
    for block, site in sites.items():
        tensors = {name: header[full] for name, full in held[block].items()}
        where = f"{path}: {block}.conv1"
        settings = _settings(where, tensors, site, gate)
        layout.mixers[site.path] = settings
        layout.names[site.path] = {_own_name(name): full for name, full in held[block].items()}
    return layout


def read_states(path: Path, layout: Layout) -> dict[str, dict[str, Tensor]]:
    """The values of every block, by site and by their names in our block."""
    states = {}
    for site, names in layout.names.items():
        state = read_some(path, {full: own for own, full in names.items()})
        for name, tensor in state.items():
            if name.startswith("convs.") and name.endswith(
                ".weight"
            ):  # the channels come last there
                state[name] = tensor.permute(2, 0, 1).unsqueeze(1).contiguous()
        states[site] = state
    return states


def _gate(model: Denoiser) -> Gate:
    gate = family_of(model).released_gate
    layout = presets.choose_preset(model)
    if gate is None or layout == "sd21":
        raise CheckpointError(
            "released files are for SD1.x, SDXL and PixArt, and this is a "
            f"{type(model).__name__} of the layout {layout}"
        )
    return gate


def _blocks(
    path: Path, header: Mapping[str, TensorInfo], average: bool
) -> dict[str, dict[str, str]]:
    """For each transformer block the full names of its tensors, of one group, by their own."""
    groups: dict[str, dict[str, dict[str, str]]] = {}
    extra = []
    for full in header:
        if match := _NAME.fullmatch(full):
            blocks = groups.setdefault(match["group"], {})
            blocks.setdefault(match["block"], {})[match["name"]] = full
        elif not _NUMBER.fullmatch(full):
            extra.append(full)
    if not groups:
        raise CheckpointError(
            f"{path} has neither blocks in the names of the released files nor a manifest in its "
            "header, as `save` writes it"
        )
    if extra:
        raise CheckpointError(f"{path} has tensors that belong to no block: {few(extra)}")
    return groups[_chosen(path, list(groups), average)]


def _chosen(path: Path, groups: list[str], average: bool) -> str:
    """Of one group, or of a plain one and a moving average, the one that is asked for."""
    averages = [group for group in groups if re.search(r"ema[:.]$", group)]
    plain = [group for group in groups if group not in averages]
    if len(averages) > 1 or len(plain) > 1:
        names = ", ".join(repr(group[:60]) for group in sorted(groups)[:4])
        raise CheckpointError(f"{path} holds several models, under {names}: one is expected")
    if not average and not plain:
        raise CheckpointError(f"{path} has the moving average only: leave average=False out")
    return averages[0] if averages and (average or not plain) else plain[0]


def _settings(where: str, tensors: Mapping[str, TensorInfo], site: Site, gate: Gate) -> DeltaConv:
    """The settings of a block, from its shapes, every one of which is checked."""
    spatial = [match for name in tensors if (match := _KERNEL.fullmatch(name))]
    kernels = sorted(int(match[1]) for match in spatial if match[2] == "weight")
    biased = sum(match[2] == "bias" for match in spatial) == len(kernels)
    if kernels != list(range(len(kernels))) or not kernels:
        raise CheckpointError(f"{where} has the stages {kernels}: they must count from 0")
    channels, stages = site.channels, len(kernels)
    inner, side = (
        _first_side(tensors, n) for n in ("conv_up.weight", "gates.0.conv_spatial.weight")
    )
    expected: dict[str, Shape] = {
        "conv_up.weight": (inner, channels),
        "conv_up.bias": (inner,),
        **{f"gates.{i}.conv_spatial.weight": (side, side, inner) for i in kernels},
        **{f"gates.{i}.conv_spatial.bias": (inner,) for i in kernels if biased},
        "conv_out.weight": (channels, inner // 2 * stages),
        "conv_out.bias": (channels,),
        "conv_pool.weight": (channels, channels),
        "conv_pool.bias": (channels,),
    }
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"{where} lacks {few(missing)}")
    if extra := tensors.keys() - expected.keys():
        raise CheckpointError(f"{where} has tensors that no block has: {few(extra)}")
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape or info.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}.{name} is {info.dtype} of shape {info.shape}, expected floats of "
                f"shape {shape}: it is damaged or for another model"
            )
    if inner < 2 or inner % 2 or side % 2 == 0:
        raise CheckpointError(
            f"{where} has {inner} inner channels and kernels of side {side}: the first must be "
            "even, the second odd"
        )
    return DeltaConv(
        kernel_size=side,
        stages=stages,
        ratio=inner / channels,
        gate=gate,
        pooling="adaptive",
        init="random",  # every value comes from the file
        conv_bias=biased,
    )


def _first_side(tensors: Mapping[str, TensorInfo], name: str) -> int:
    return next(iter(tensors[name].shape), 0) if name in tensors else 0


def _own_name(name: str) -> str:
    """The name in our block of a tensor of theirs."""
    if match := _KERNEL.fullmatch(name):
        return f"convs.{match[1]}.{match[2]}"
    layer, _, kind = name.partition(".")
    return f"{LAYERS[layer]}.{kind}"
