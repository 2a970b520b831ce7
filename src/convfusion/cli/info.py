"""`convfusion info`: what a folder or file is, from its configs, manifests and headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convfusion.cli.console import print_ending
from convfusion.cli.models import SINGLE_FILES, is_embedded, warn_of
from convfusion.errors import CheckpointError, ConvFusionError

if TYPE_CHECKING:
    from convfusion.surgery.record import TrainingRecord

Place = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER_OR_MODEL",
        help="A model, trained blocks, a cache, a distillation run, an evaluation, a "
        ".safetensors file; or `mini`.",
    ),
]

# What other commands write, by the file that tells it, and how it is looked at.
REPORTS = {
    "analysis.json": ("An analysis of self-attention, by `convfusion analyze`.", "report.html"),
    "ablation.json": ("An ablation without training, by `convfusion ablate`.", "ablation.png"),
    "curve.json": ("A replacement curve, by `convfusion curve`.", "curve.png"),
    "demo.json": ("The results of `convfusion demo`.", "report.html"),
}


@dataclass(frozen=True)
class Description:
    """What is known of a folder or file.

    Attributes:
        lines: sentences.
        next_command: words of the command to type next, if there is one.
    """

    lines: list[str]
    next_command: Sequence[Any] = ()


def info(place: Place) -> None:
    """Say what a folder or file is, how far it got, and what to do with it. Loads no weights."""
    description = describe_place(place)
    for line in description.lines:
        typer.echo(line)
    print_ending(next_command=description.next_command)


def describe_place(place: str) -> Description:
    """What a folder, a file or the name of the embedded model is.

    Raises:
        ConvFusionError: nothing is there, or it is nothing that ConvFusion knows.
    """
    path = Path(place)
    if is_embedded(place):
        return describe_embedded(place)
    if path.is_file() and path.suffix == ".safetensors":
        return describe_file(path)
    if not path.is_dir():
        raise ConvFusionError(
            f"{place} is no folder and no .safetensors file here, and not `mini`; models on the "
            "Hub are described once they are on disk"
        )
    describers = {
        "model_index.json": describe_pipeline,
        "run.toml": describe_run,
        "checkpoints": describe_run,
        "convfusion.json": describe_blocks,
        "cache.json": describe_cache,
        "evaluation.json": describe_evaluation,
        "settings.json": describe_unfinished_evaluation,
        **dict.fromkeys(REPORTS, describe_report),
    }
    for name, describe in describers.items():
        if (path / name).exists():
            return describe(path)
    raise ConvFusionError(
        f"{place} holds nothing that ConvFusion knows: no model, blocks, cache, run or report"
    )


def describe_embedded(name: str) -> Description:
    from convfusion import mini

    lines = ["The small model that comes with ConvFusion, which draws emoji at 64×64 pixels."]
    teacher = describe_pipeline(mini.TEACHER).lines
    student = mini.NAMES[name]
    if student is not None:
        lines += [line for line in teacher if not line.startswith("Converted:")]
        lines += [
            "Converted: yes, with these blocks.",
            *describe_blocks(mini.STUDENTS / student).lines,
        ]
    else:
        lines += teacher
    return Description(lines, ("convfusion", "generate", name, "--prompt", "red apple, noto"))


def describe_pipeline(folder: Path) -> Description:
    """A pipeline in diffusers' layout, converted or not."""
    import torch

    from convfusion.checkpoint import loading, pipelines
    from convfusion.families import component_names, family_of, list_sites

    index = _read_object(folder / loading.INDEX)
    loading.check_index(index, folder)
    part = next(name for name in component_names() if (folder / name / "config.json").is_file())
    kind, config = loading.denoiser_class(folder / part)
    with torch.device("meta"):
        model = loading.build(kind, config, folder / part / "config.json")
    listed = list_sites(model)
    sites, shared = len(listed), sum(site.joint is not None for site in listed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    family = family_of(model).name
    lines = [
        f"A diffusers pipeline: {index.get('_class_name')}.",
        f"Denoiser: {kind.__name__}, of the family {family}, {parameters / 1e6:.1f}M parameters, "
        f"{sites} self-attention layers (sites).",
    ]
    if shared:
        some = "all" if shared == sites else str(shared)
        lines.append(
            f"Text and image share {some} of them: a block replaces what goes from image to image "
            "there."
        )
    inner = folder / pipelines.OURS / "convfusion.json"
    if not inner.is_file():
        lines.append("Converted: no.")
        return Description(lines, ("convfusion", "convert", folder, "--out", "converted"))
    manifest = _read_object(inner)
    lines.append(f"Converted: {describe_sites(manifest, sites)}.")
    record = read_record(inner.parent)
    lines.append(describe_training(record))
    if next(folder.glob(f"*/{pipelines.BARE}"), None) is not None:
        lines.append(
            "The attention of these sites was dropped, so they cannot be trained any further."
        )
    elif record is not None and not record.is_trained:
        data = ("--data", "DATA", "--out", "convfusion-blocks")
        return Description(lines, ("convfusion", "distill", folder, *data))
    return Description(lines, ("convfusion", "generate", folder, "--prompt", "a red apple"))


def describe_blocks(folder: Path) -> Description:
    """Trained blocks without their base."""
    from convfusion.files import read_header

    manifest = _read_object(folder / "convfusion.json")
    header = read_header(folder / "blocks.safetensors")
    count = sum(math.prod(tensor.shape) for tensor in header.values())
    base = str(manifest.get("base_model") or "") or "unknown"
    lines = [
        f"Blocks for a model of the family {manifest.get('family')}; base model: {base}.",
        f"They replace attention at {describe_sites(manifest)}.",
        f"Parameters: {count / 1e6:.2f}M. Written by ConvFusion {manifest.get('version')}.",
        describe_training(read_record(folder)),
    ]
    model = base if "/" in base or Path(base).exists() else "MODEL"  # a Hub name, or a folder
    command = ("convfusion", "generate", model, "--blocks", folder, "--prompt", "a red apple")
    return Description(lines, command)


def describe_sites(manifest: Mapping[str, Any], sites: int | None = None) -> str:
    """How many sites have which mixer: `7 of 7 sites, 7 × delta_conv`."""
    mixers = [site["mixer"].get("kind", "?") for site in manifest["sites"].values()]
    kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(mixers).items())
    return f"{len(mixers)}{f' of {sites}' if sites else ''} sites ({kinds})"


def read_record(folder: Path) -> TrainingRecord | None:
    """What the blocks in a folder have been through; None where they have nothing to train.

    Raises:
        CheckpointError: it is told in a way that nothing writes.
    """
    from convfusion.files import read_header
    from convfusion.surgery.record import TrainingRecord

    file = folder / "convfusion.json"
    try:
        record = TrainingRecord.from_dict(_read_object(file))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged: {error} does not say whether the blocks are trained"
        ) from None
    return record if read_header(folder / "blocks.safetensors") else None


def describe_training(record: TrainingRecord | None) -> str:
    """Whether blocks were trained, for how long, and what to expect of those that were not."""
    if record is None:
        return "These blocks have nothing to train."
    if not record.is_trained:
        return warn_of(record)
    if record.origin == "released":
        return f"These blocks are {record}."
    if record.steps:
        return f"These blocks are trained for {record.steps:,} steps."
    return "Whether these blocks are trained is unknown, since their manifest does not say."


def describe_run(folder: Path) -> Description:
    """A distillation run: its model, how far it got, and its ε-error."""
    from convfusion.distill.logs import HELD_OUT, read_history
    from convfusion.distill.settings import read_settings, run_settings
    from convfusion.distill.state import last_checkpoint, step_of

    kept = run_settings(folder)
    run = read_settings(kept, {}) if kept.is_file() else None
    last = last_checkpoint(folder)
    done = step_of(last) if last else 0
    steps = 0
    if run is not None:
        steps = run.distill.steps
    elif last is not None:
        steps = _read_object(last / "trainer.json")["config"]["steps"]
    lines = [f"A distillation run, {done} of {steps} steps done."]
    if run is not None:
        lines.append(f"Model: {run.model}. Data: {run.data or 'that of the embedded model'}.")
    errors = [entry for entry in read_history(folder) if HELD_OUT in entry]
    if errors:
        lines.append(f"ε-error on held-out samples: {errors[-1][HELD_OUT]:.2e}.")
    if (folder / "convfusion.json").is_file():
        lines += describe_blocks(folder).lines
    if done < steps:
        command = ("convfusion", "distill", "--out", folder, "--resume")
        return Description(lines, command if run else (*command, "MODEL"))
    model = run.model if run else "MODEL"
    words = ("convfusion", "compare", "mini-teacher" if is_embedded(model) else model)
    return Description(lines, (*words, "--blocks", folder, "--prompt", "a red apple"))


def describe_cache(folder: Path) -> Description:
    """Encoded pictures and captions."""
    from convfusion.data.store import read_manifest

    manifest = read_manifest(folder)
    command = ("convfusion", "distill", "MODEL", "--data", folder, "--out", "convfusion-blocks")
    if not manifest.get("complete"):
        lines = ["A cache of training data that is not complete.", "Run the same command again."]
        return Description(lines)
    sizes = ", ".join(f"{count:,} at {size}" for size, count in manifest["sizes"].items())
    lines = [f"A cache of training data: {manifest['samples']:,} samples ({sizes})."]
    if skipped := sum(entry["count"] for entry in manifest["skipped"].values()):
        lines.append(f"Skipped: {skipped:,} samples that could not be used.")
    return Description(lines, command)


def describe_evaluation(folder: Path) -> Description:
    """A finished evaluation."""
    record = _read_object(folder / "evaluation.json")
    lines = [
        f"An evaluation of {record['student']} against {record['teacher']}, "
        f"{len(record['samples'])} samples.",
        f"Open {folder / 'report.html'} in a browser.",
    ]
    return Description(lines)


def describe_unfinished_evaluation(folder: Path) -> Description:
    """An evaluation that was stopped."""
    return Description(
        ["An evaluation that is not finished. Run the same `convfusion evaluate` command again."]
    )


def describe_report(folder: Path) -> Description:
    """What an analysis, an ablation, a curve or the demo wrote."""
    name = next(name for name in REPORTS if (folder / name).is_file())
    text, shown = REPORTS[name]
    return Description([text, f"Look at {folder / shown}."])


def describe_file(path: Path) -> Description:
    """A single file of weights, by the names of its tensors."""
    from convfusion.files import read_header

    header = read_header(path)
    count = sum(math.prod(tensor.shape) for tensor in header.values()) / 1e6
    for prefix, kind in SINGLE_FILES.items():
        if any(name.startswith(prefix) for name in header):
            lines = [f"A single file of weights for a {kind}, {count:.1f}M parameters."]
            return Description(lines, ("convfusion", "convert", path, "--out", "converted"))
    if any(".conv1.gates." in name for name in header):
        lines = [f"Trained blocks that the paper's authors released, {count:.1f}M parameters."]
        command = ("convfusion", "generate", "MODEL", "--blocks", path, "--prompt", "a red apple")
        return Description(lines, command)
    raise ConvFusionError(
        f"{path} holds {len(header)} tensors, but no model or blocks that ConvFusion knows"
    )


def _read_object(path: Path) -> dict[str, Any]:
    """An object of a JSON file."""
    from convfusion.files import read_json

    value = read_json(path)
    if not isinstance(value, dict):
        raise ConvFusionError(f"{path} is damaged: it should hold an object of JSON")
    return value
