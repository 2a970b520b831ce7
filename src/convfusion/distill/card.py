"""The model card of a run: what was trained, on what, how it went, and how to use it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convfusion import __version__, checkpoint, files, mini
from convfusion.checkpoint import card
from convfusion.checkpoint.manifests import public_name, read_manifest
from convfusion.checkpoint.publish import CARD
from convfusion.distill.logs import read_history
from convfusion.distill.run import DistillResult
from convfusion.distill.settings import RunSettings, as_toml
from convfusion.families import denoiser_of
from convfusion.fingerprint import fingerprint
from convfusion.surgery import mixers_of, status
from convfusion.text import address, markdown_block, markdown_text

CURVES = "losses.png"


def write_card(folder: Path, pipe: Any, run: RunSettings, result: DistillResult) -> None:
    """Write `README.md`, with the curves of the losses where matplotlib is installed."""
    manifest = read_manifest(folder / checkpoint.MANIFEST)
    embedded = run.model in mini.NAMES
    base = run.model if embedded else manifest["base_model"] or run.model
    history = read_history(folder)
    curves = draw_curves(history, folder / CURVES)
    what = WHAT.format(
        kinds=card.describe_kinds(manifest),
        sites=status(pipe).converted,
        every=len(status(pipe).sites),
        base=markdown_text(base),
        parameters=sum(p.numel() for m in mixers_of(pipe).values() for p in m.parameters()) / 1e6,
        version=__version__,
        weights=frozen_weights(pipe),
    )
    body = card.CONTENT.format(
        base=markdown_text(base),
        kinds=card.describe_kinds(manifest),
        what=what,
        use=card.describe_use(base, FROM_PACKAGE if embedded else None),
        blocks=card.describe_blocks(manifest),
        measured=card.UNMEASURED,
        limits=card.LIMITS,
    )
    training = TRAINING.format(
        results=results(result, history),
        curves=f"![Losses]({CURVES})" if curves else "",
        samples=samples(folder),
        settings=markdown_block("toml", as_toml(hide_paths(run))),
        table=markdown_block("text", str(status(pipe))),
    )
    head = card.describe_head(base, manifest["family"], "distillation")
    files.write_text(folder / CARD, f"{head}{body}\n{training}".rstrip() + "\n")


FROM_PACKAGE = """import convfusion
from convfusion import mini

pipe = mini.load_teacher()"""

WHAT = """These {kinds} take the place of {sites} of the {every} self-attention layers of {base}.
They have {parameters:.2f}M parameters, and were distilled from the attention that they replace by
ConvFusion {version}. Everything else is the base model, which is not part of this repository and
keeps its own licence.

Fingerprint of the base's denoiser: `{weights}`."""

TRAINING = """## Training

{results}

{curves}

{samples}

{settings}

{table}
"""


def hide_paths(run: RunSettings) -> RunSettings:
    """The settings of a run with the last parts of paths alone: a card may be published."""
    return replace(
        run,
        model=public_name(run.model),
        data=public_name(run.data),
        config=public_name(run.config),
    )


def frozen_weights(pipe: Any) -> str:
    """The fingerprint of a converted denoiser's stock weights."""
    return fingerprint(denoiser_of(pipe), without=".mixer.")


def results(result: DistillResult, history: Sequence[dict[str, Any]]) -> str:
    """The figures of a run as a list."""
    lines = [f"- {result.steps} steps, of which {result.skipped} were skipped as not finite"]
    if result.epsilon_error is not None:
        lines.append(
            "- ε-error, the mean of ‖ε̂ − ε̃‖²/‖ε̃‖² over ten timesteps, on samples held out: "
            + told(result.epsilon_error)
        )
    for name in sorted({key for entry in history for key in entry if key.startswith("loss/")}):
        values = [entry[name] for entry in history if name in entry]
        tail = values[-max(1, len(values) // 20) :]
        text = f"{values[0]:.3e}"
        if len(values) > 1:
            text += f" at first, {sum(tail) / len(tail):.3e} at last"
        lines.append(f"- {name.removeprefix('loss/')}: {text}")
    return "\n".join(lines)


def told(error: float) -> str:
    """An ε-error in words."""
    return f"{error:.3e}" if math.isfinite(error) else "not finite"


def samples(folder: Path) -> str:
    """The last validation pictures, by their file."""
    last = max((folder / "validation").glob("*.png"), default=None)
    if last is None:
        return ""
    return (
        f"![Student and teacher from equal seeds]({address(last.relative_to(folder).as_posix())})"
    )


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the loss terms over the steps; False where there is nothing to draw with, or to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = sorted({key for entry in history for key in entry if key.startswith("loss/")})
    if not names:
        return False
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name.removeprefix("loss/"), linewidth=1)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())
    return True
