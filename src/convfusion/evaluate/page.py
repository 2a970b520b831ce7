"""The report of an evaluation: one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from convfusion import report
from convfusion.evaluate import plots
from convfusion.evaluate.clips_page import describe_size, show_clips, show_motion
from convfusion.evaluate.drawing import OTHER, STUDENT, TEACHER
from convfusion.evaluate.drawn import picture_of
from convfusion.evaluate.images import mean_of_psnr
from convfusion.evaluate.measure import NEIGHBOURS, REAL, Distribution, SampleResult
from convfusion.evaluate.results import Evaluation
from convfusion.evaluate.scores import mean_of
from convfusion.evaluate.verdict import format_mean, format_thousandths, give_verdict
from convfusion.files import write_text
from convfusion.report import render_figure

SHOWN = 8  # samples in the grid
WORST = 24  # prompts in the list
SIDE = 128  # of a picture in the list
STRIP = 640  # of the strip of a clip in the list

WORDS = {
    STUDENT: "student",
    TEACHER: "teacher",
    OTHER: "teacher, other noises",
    REAL: "real pictures",
}
STYLE = """<style>td { vertical-align: top; }
.list img { width: 128px; height: auto; image-rendering: pixelated; display: block; }
.list td { padding: .35rem .5rem; }
.list.strips img { width: 320px; margin-bottom: 2px; }</style>"""


def write_page(evaluation: Evaluation, folder: Path) -> None:
    """Write `report.html` to the folder with the pictures."""
    write_text(folder / "report.html", build_page(evaluation, folder))


def build_page(evaluation: Evaluation, folder: Path) -> str:
    """The report as one page that needs no other file."""
    drawn = evaluation.settings
    motion = evaluation.motion
    body = [
        STYLE,
        "<h1>Is the student as good as its teacher?</h1>",
        report.show_verdict(give_verdict(evaluation)),
        f"<p>Student: {html.escape(evaluation.student)}. "
        f"Teacher: {html.escape(evaluation.teacher)}. Both drew {drawn['samples']} "
        f"{evaluation.noun} of {describe_size(drawn)} from {drawn['prompts']} prompts by equal "
        f"noises, in {drawn['steps']} steps at guidance {drawn['guidance']:g}. "
        "The teacher drew them once more from other noises: what differs then is chance alone. "
        f"{report.HINT}</p>",
        _show_grid(evaluation, folder) if motion is None else show_clips(evaluation, folder),
        f"<h2>{evaluation.noun.capitalize().rstrip('s')} by {evaluation.noun.rstrip('s')}</h2>",
        _show_pairs(evaluation),
        "" if motion is None else show_motion(evaluation, motion),
        f"<h2>As sets of {evaluation.noun}</h2>",
        _show_sets(evaluation),
        "<h2>Along the timesteps</h2>",
        f"<p>Mean {evaluation.error_formula} of student and teacher on the teacher’s "
        f"{evaluation.noun}, noised to each timestep.</p>",
        _show_figure(
            plots.epsilon_errors(evaluation.curves, evaluation.error_name),
            f"{evaluation.error_name} by timestep",
        ),
        "<h2>Along the way</h2>",
        "<p>How far the latents x̂ of the student have strayed from the teacher’s x after each "
        "step, from the same noise; and how far apart the teacher’s own are from two noises.</p>",
        _show_figure(plots.trajectories(evaluation.curves), "Distance of latents by step"),
        f"<h2>Prompt by prompt, the worst first</h2>{_show_worst(evaluation, folder)}",
    ]
    return report.fill_page("Student and teacher", "\n".join(body))


def name_set(side: str, noun: str) -> str:
    """What a table calls a set of pictures or clips."""
    return WORDS.get(side, side).replace("pictures", noun)


def _show_grid(evaluation: Evaluation, folder: Path) -> str:
    count = min(SHOWN, len(evaluation.samples))
    chosen = [
        evaluation.samples[int((i + 0.5) * len(evaluation.samples) / count)] for i in range(count)
    ]
    rows = {
        WORDS[side]: [_shrink(folder, side, each.index) for each in chosen]
        for side in (TEACHER, STUDENT, OTHER)
    }
    sheet = report.draw_grid(rows, [sample.prompt for sample in chosen])
    return report.show_picture(sheet, "Pictures by prompt and model")


def _show_pairs(evaluation: Evaluation) -> str:
    """What is measured between two pictures of one prompt."""
    student = [sample.student for sample in evaluation.samples]
    other = [sample.other_seed for sample in evaluation.samples]
    equal = sum(pair.psnr is None for pair in student)
    prompts = [sample.prompt for sample in evaluation.samples]
    epsilon, strayed = (
        mean_of([getattr(sample, name) for sample in evaluation.samples], prompts)
        for name in ("epsilon_error", "latent_error")
    )
    rows: list[tuple[str, ...]] = [
        (evaluation.error_name, format_mean(epsilon, ".2e"), "–"),
        (
            "latents after the last step, ‖x̂ − x‖² / ‖x‖²",
            format_mean(strayed, ".2e"),
            f"{evaluation.curves.latent_errors_other_seed[-1]:.2e}",
        ),
    ]
    for name, words, form in (
        ("psnr", "PSNR in dB, higher is closer", ".1f"),
        ("ssim", "SSIM, 1 is equal", ".3f"),
        ("cosine", f"cosine of {html.escape(evaluation.extractor['name'])} features", ".3f"),
    ):
        cells = [
            format_mean(mean_of_psnr([getattr(pair, name) for pair in side], prompts), form)
            for side in (student, other)
        ]
        rows.append((words, *cells))
    note = (
        f'<p class="note">Each against the teacher’s {evaluation.noun.rstrip("s")} of the same '
        "prompt: the student’s from the same noise, the teacher’s own from other noises. Mean ± "
        "standard error over prompts"
        + ("" if evaluation.motion is None else "; PSNR and SSIM are means over the frames")
        + (f"; {equal} pairs of equal {evaluation.noun} are left out of the PSNR" if equal else "")
        + ".</p>"
    )
    return (
        report.show_table(
            ("", "student, equal noises", "teacher, other noises"), rows, kind="dense"
        )
        + note
    )


def _show_sets(evaluation: Evaluation) -> str:
    """Distances between sets of pictures, and what is said of a set by itself."""
    name = html.escape(evaluation.extractor["name"])
    heads = (
        evaluation.noun,
        "samples",
        "Fréchet distance",
        "kernel distance ×10³",
        "beyond the teacher’s",
    )
    near = ("precision", "recall", "density", "coverage")
    frames = "" if evaluation.motion is None else ", as means over frames of each clip"
    tables = [f"<p>By the features of {name}{frames}.</p>"]
    for reference, words in (
        (
            OTHER,
            f"the teacher’s {evaluation.noun} from other noises; the grey row is the floor: what "
            "the teacher reaches against itself",
        ),
        (REAL, f"real {evaluation.noun}; the grey rows are the teacher’s, from two noises"),
    ):
        rows = [row for row in evaluation.distributions if row.reference == reference]
        if rows:
            tables.append(f"<p>Against {words}.</p>")
            tables.append(
                report.show_table(
                    (*heads, *near),
                    [_show_distribution(row, evaluation.noun) for row in rows],
                    kind="dense",
                    grey=[row.pictures != STUDENT for row in rows],
                )
            )
    return (
        "".join(tables)
        + _name_gaps(evaluation)
        + _explain_bias(evaluation)
        + _show_scores(evaluation)
    )


def _show_distribution(row: Distribution, noun: str) -> tuple[str, ...]:
    near = (row.precision, row.recall, row.density, row.coverage)
    return (
        name_set(row.pictures, noun),
        f"{row.samples} against {row.reference_samples}",
        f"{row.frechet:.4g}",
        format_thousandths(row.kid, row.kid_error),
        "" if row.kid_excess is None else format_thousandths(row.kid_excess, row.kid_excess_error),
        *("–" if value is None else f"{value:.2f}" for value in near),
    )


def _name_gaps(evaluation: Evaluation) -> str:
    """What the tables of sets do not have."""
    notes = []
    if any(row.precision is None for row in evaluation.distributions):
        notes.append(
            "Precision, recall, density and coverage need more than "
            f"{NEIGHBOURS} {evaluation.noun} a set."
        )
    if evaluation.real and evaluation.real["skipped"]:
        reasons = ", ".join(
            f"{count}× {html.escape(reason)}"
            for reason, count in evaluation.real["skipped"].items()
        )
        notes.append(f"Real {evaluation.noun} that could not be used and are left out: {reasons}.")
    return f'<p class="note">{" ".join(notes)}</p>' if notes else ""


def _explain_bias(evaluation: Evaluation) -> str:
    """How far a Fréchet distance can be trusted with so few pictures."""
    count, width = len(evaluation.samples), evaluation.extractor["features"]
    text = (
        "A Fréchet distance is too large by an amount that falls with the number of "
        f"{evaluation.noun}. Read it against the grey row, which has the same bias, and compare no "
        "numbers of other counts or networks. "
    )
    if count <= 10 * width:
        text = (
            f"<b>{count} {evaluation.noun} with {width} features: a Fréchet distance is mostly "
            "bias here"
            + (", since so few span a part of the features only" if count <= width else "")
            + ".</b> "
            + text
        )
    text += (
        "The kernel distance (KID) has no such bias: 0 is expected of two sets of one kind, and "
        "less of two sets of the same prompts. Precision and density tell how many "
        f"{evaluation.noun} lie where the reference does, recall and coverage how much of it they "
        "reach."
    )
    return f'<p class="note">{text}</p>'


def _show_scores(evaluation: Evaluation) -> str:
    heads, columns = [evaluation.noun, "samples"], []
    if any(row.class_score is not None for row in evaluation.scores):
        heads.append(f"class score, {html.escape(evaluation.extractor['name'])}")
        columns.append([_format_number(row.class_score, ".2f") for row in evaluation.scores])
    if any(row.clip is not None for row in evaluation.scores):
        heads.append("CLIP score")
        columns.append(
            [
                _format_number(row.clip, ".2f")
                + (f" ± {row.clip_error:.2f}" if row.clip_error else "")
                for row in evaluation.scores
            ]
        )
    if not columns:
        return ""
    noun = evaluation.noun
    first = [(name_set(row.pictures, noun), str(row.samples)) for row in evaluation.scores]
    table = [(*names, *cells) for names, *cells in zip(first, *columns, strict=True)]
    grey = [row.pictures != STUDENT for row in evaluation.scores]
    shown = report.show_table(heads, table, kind="dense", grey=grey)
    if all(row.class_score is None for row in evaluation.scores):
        return shown
    return (
        f'{shown}<p class="note">Class score: exp of the mean KL divergence between the classes '
        "that the network sees in one picture and in all; the inception score’s formula on this "
        "network’s classes. It grows with the number of pictures.</p>"
    )


def _show_worst(evaluation: Evaluation, folder: Path) -> str:
    """Prompts by the mean PSNR of their samples, each with its worst one."""
    prompts: dict[str, list[SampleResult]] = {}
    for sample in evaluation.samples:
        prompts.setdefault(sample.prompt, []).append(sample)

    def closeness(rows: Iterable[SampleResult]) -> float:
        return float(np.mean([np.inf if r.student.psnr is None else r.student.psnr for r in rows]))

    order = sorted(prompts.values(), key=closeness)[:WORST]
    strips = evaluation.motion is not None  # which are wide: one below the other
    sides = ("teacher above, student below",) if strips else ("teacher", "student")
    heads = ("prompt", *sides, "PSNR", "SSIM", "cosine", evaluation.error_name)
    rows = []
    for samples in order:
        worst = min(samples, key=lambda sample: closeness([sample]))
        most = STRIP if strips else SIDE
        images = [_shrink(folder, side, worst.index, most) for side in (TEACHER, STUDENT)]
        shown = [f'<img alt="" src="{report.embed_picture(image)}">' for image in images]
        if strips:
            shown = ["".join(shown)]
        label = f"{html.escape(worst.prompt)}<br><span class=note>seed {worst.seed}</span>"
        rows.append(
            (
                label,
                *shown,
                "equal" if (db := closeness(samples)) == np.inf else f"{db:.1f} dB",
                f"{np.mean([sample.student.ssim for sample in samples]):.3f}",
                f"{np.mean([sample.student.cosine for sample in samples]):.3f}",
                f"{np.mean([sample.epsilon_error for sample in samples]):.2e}",
            )
        )
    note = (
        f'<p class="note">{len(order)} of {len(prompts)} prompts, by PSNR against the teacher’s '
        f"{evaluation.noun.rstrip('s')} from the same noise; numbers are means over the samples of "
        f"a prompt, the {evaluation.noun} are of its worst one. All samples are in "
        "<code>samples.csv</code>.</p>"
    )
    return note + report.show_table(heads, rows, kind="list strips" if strips else "list")


def _format_number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _shrink(folder: Path, side: str, index: int, most: int = SIDE) -> Image.Image:
    """A picture as the page shows it: shrunk if a side of it is longer than that."""
    with Image.open(picture_of(folder, side, index), formats=("PNG",)) as file:
        image = file.convert("RGB")
    scale = most / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _show_figure(figure: plots.Figure, words: str) -> str:
    return report.show_picture(render_figure(figure), words)
