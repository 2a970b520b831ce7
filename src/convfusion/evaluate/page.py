"""The report of an evaluation: one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from convfusion import report
from convfusion.evaluate import plots
from convfusion.evaluate.drawing import OTHER, STUDENT, TEACHER, picture_of
from convfusion.evaluate.images import mean_of_psnr
from convfusion.evaluate.measure import NEIGHBOURS, REAL, Distribution, SampleResult
from convfusion.evaluate.results import Evaluation
from convfusion.evaluate.scores import Mean, mean_of
from convfusion.files import write_text
from convfusion.report import render_figure

SHOWN = 8  # samples in the grid
WORST = 24  # prompts in the list
SIDE = 128  # of a picture in the list

WORDS = {
    STUDENT: "student",
    TEACHER: "teacher",
    OTHER: "teacher, other noises",
    REAL: "real pictures",
}
STYLE = """<style>td { vertical-align: top; }
table.list img { width: 128px; height: auto; image-rendering: pixelated; display: block; }
table.list td { padding: .35rem .5rem; }
tr.floor td { color: #57606a; }</style>"""


def write_page(found: Evaluation, folder: Path) -> None:
    """Write `report.html` to the folder with the pictures."""
    write_text(folder / "report.html", page(found, folder))


def page(found: Evaluation, folder: Path) -> str:
    """The report as one page that needs no other file."""
    told = found.settings
    height, width = told["size"]
    body = [
        STYLE,
        "<h1>Is the student as good as its teacher?</h1>",
        f"<p>Student: {html.escape(found.student)}. Teacher: {html.escape(found.teacher)}. Both "
        f"drew {told['samples']} pictures of {width}×{height} from {told['prompts']} prompts by "
        f"equal noises, in {told['steps']} steps at guidance {told['guidance']:g}. The teacher "
        "drew them once more from other noises: what differs then is chance alone.</p>",
        _in_short(found),
        _grid(found, folder),
        "<h2>Picture by picture</h2>",
        _pairs(found),
        "<h2>As sets of pictures</h2>",
        _sets(found),
        "<h2>Along the timesteps</h2>",
        "<p>Mean ‖ε̂ − ε̃‖² / ‖ε̃‖² of student and teacher on the teacher’s pictures, noised to each "
        "timestep.</p>",
        _figure(plots.epsilon_errors(found.curves), "ε-error by timestep"),
        "<h2>Along the way</h2>",
        "<p>How far the latents x̂ of the student have strayed from the teacher’s x after each "
        "step, from the same noise; and how far apart the teacher’s own are from two noises.</p>",
        _figure(plots.trajectories(found.curves), "Distance of latents by step"),
        f"<h2>Prompt by prompt, the worst first</h2>{_worst(found, folder)}",
    ]
    return report.PAGE.format(title="Student and teacher", body="\n".join(body))


def _in_short(found: Evaluation) -> str:
    """The two answers that numbers of this kind can give."""
    prompts = [each.prompt for each in found.samples]
    student = mean_of_psnr([each.student.psnr for each in found.samples], prompts)
    other_seed = mean_of_psnr([each.other_seed.psnr for each in found.samples], prompts)
    alike = "draws the teacher’s pictures again"
    if student.value is not None:
        alike = f"reaches a PSNR of {_mean(student, '.1f')} dB against the teacher"
    other = "equal ones" if other_seed.value is None else f"{_mean(other_seed, '.1f')} dB"
    return (
        f"<p><b>From equal noises the student {alike}, where other noises give {other}. "
        f"{_verdict(found.distributions[0], found.settings['prompts'])}</p>"
    )


def _verdict(student: Distribution, prompts: int) -> str:
    """Whether the student's set is further from the teacher's than chance has it."""
    excess, error = student.kid_excess, student.kid_excess_error
    if excess is None or error is None or prompts <= NEIGHBOURS:
        told = f"{student.samples} pictures of {prompts} prompts"
        return f"{told} are too few to be compared as sets.</b>"
    verdict = (
        f"{student.samples} pictures cannot tell whether the student’s are further from the "
        "teacher’s than the teacher’s own from other noises: a difference of less than "
        f"{_rounded(2e3 * error)} would not show"
    )
    if abs(excess) > 2 * error:
        verdict = (
            f"As a set, the student’s pictures are {'further' if excess > 0 else 'less far'} from "
            "the teacher’s than the teacher’s own from other noises, beyond chance"
        )
    return (
        f"{verdict}</b> (difference of the kernel distances ×10³: {_thousandths(excess, error)}; "
        "chance is two standard errors)."
    )


def _grid(found: Evaluation, folder: Path) -> str:
    count = min(SHOWN, len(found.samples))
    chosen = [found.samples[int((i + 0.5) * len(found.samples) / count)] for i in range(count)]
    rows = {
        WORDS[side]: [_shrunk(folder, side, each.index) for each in chosen]
        for side in (TEACHER, STUDENT, OTHER)
    }
    sheet = report.labelled_grid(rows, [each.prompt for each in chosen])
    return f'<p><img alt="Pictures by prompt and model" src="{report.data_uri(sheet)}"></p>'


def _pairs(found: Evaluation) -> str:
    """What is measured between two pictures of one prompt."""
    student = [each.student for each in found.samples]
    other = [each.other_seed for each in found.samples]
    equal = sum(each.psnr is None for each in student)
    prompts = [each.prompt for each in found.samples]
    epsilon, strayed = (
        mean_of([getattr(each, name) for each in found.samples], prompts)
        for name in ("epsilon_error", "latent_error")
    )
    rows: list[tuple[str, ...]] = [
        ("ε-error", _mean(epsilon, ".2e"), "–"),
        (
            "latents after the last step, ‖x̂ − x‖² / ‖x‖²",
            _mean(strayed, ".2e"),
            f"{found.curves.latent_errors_other_seed[-1]:.2e}",
        ),
    ]
    for name, words, form in (
        ("psnr", "PSNR in dB, higher is closer", ".1f"),
        ("ssim", "SSIM, 1 is equal", ".3f"),
        ("cosine", f"cosine of {html.escape(found.extractor['name'])} features", ".3f"),
    ):
        cells = [
            _mean(mean_of_psnr([getattr(each, name) for each in side], prompts), form)
            for side in (student, other)
        ]
        rows.append((words, *cells))
    note = (
        '<p class="note">Each against the teacher’s picture of the same prompt: the student’s from '
        "the same noise, the teacher’s own from other noises. Mean ± standard error over prompts"
        + (f"; {equal} pairs of equal pictures are left out of the PSNR" if equal else "")
        + ".</p>"
    )
    return _table(("", "student, equal noises", "teacher, other noises"), rows) + note


def _sets(found: Evaluation) -> str:
    """Distances between sets of pictures, and what is said of a set by itself."""
    name = html.escape(found.extractor["name"])
    heads = (
        "pictures",
        "samples",
        "Fréchet distance",
        "kernel distance ×10³",
        "beyond the teacher’s",
    )
    near = ("precision", "recall", "density", "coverage")
    tables = [f"<p>By the features of {name}.</p>"]
    for reference, words in (
        (
            OTHER,
            "the teacher’s pictures from other noises; the grey row is the floor: what the "
            "teacher reaches against itself",
        ),
        (REAL, "real pictures; the grey rows are the teacher’s, from two noises"),
    ):
        rows = [row for row in found.distributions if row.reference == reference]
        if rows:
            tables.append(f"<p>Against {words}.</p>")
            tables.append(
                _table(
                    (*heads, *near),
                    [_distribution(row) for row in rows],
                    [row.pictures != STUDENT for row in rows],
                )
            )
    return "".join(tables) + _left_out(found) + _bias(found) + _scores(found)


def _distribution(row: Distribution) -> tuple[str, ...]:
    near = (row.precision, row.recall, row.density, row.coverage)
    return (
        WORDS[row.pictures],
        f"{row.samples} against {row.reference_samples}",
        f"{row.frechet:.4g}",
        _thousandths(row.kid, row.kid_error),
        "" if row.kid_excess is None else _thousandths(row.kid_excess, row.kid_excess_error),
        *("–" if value is None else f"{value:.2f}" for value in near),
    )


def _thousandths(value: float, error: float | None) -> str:
    if error is None:
        return f"{1e3 * value:.0f}".replace("-", "−")
    digits = _digits(1e3 * error)
    return f"{1e3 * value:.{digits}f} ± {1e3 * error:.{digits}f}".replace("-", "−")


def _rounded(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    """Behind the point, for two significant ones of a number, three at most."""
    return 0 if value >= 10 else 1 if value >= 1 else 2 if value >= 0.1 else 3


def _left_out(found: Evaluation) -> str:
    """What the tables of sets do not have."""
    notes = []
    if any(row.precision is None for row in found.distributions):
        notes.append(
            f"Precision, recall, density and coverage need more than {NEIGHBOURS} pictures a set."
        )
    if found.real and found.real["skipped"]:
        reasons = ", ".join(
            f"{count}× {html.escape(reason)}" for reason, count in found.real["skipped"].items()
        )
        notes.append(f"Real pictures that could not be used and are left out: {reasons}.")
    return f'<p class="note">{" ".join(notes)}</p>' if notes else ""


def _bias(found: Evaluation) -> str:
    """How far a Fréchet distance can be trusted with so few pictures."""
    count, width = len(found.samples), found.extractor["features"]
    text = (
        "A Fréchet distance is too large by an amount that falls with the number of pictures. Read "
        "it against the grey row, which has the same bias, and compare no numbers of other counts "
        "or networks. "
    )
    if count <= 10 * width:
        text = (
            f"<b>{count} pictures with {width} features: a Fréchet distance is mostly bias here"
            + (", since so few span a part of the features only" if count <= width else "")
            + ".</b> "
            + text
        )
    text += (
        "The kernel distance (KID) has no such bias: 0 is expected of two sets of one kind, and "
        "less of two sets of the same prompts. Precision and density tell how many pictures lie "
        "where the reference does, recall and coverage how much of it they reach."
    )
    return f'<p class="note">{text}</p>'


def _scores(found: Evaluation) -> str:
    heads, columns = ["pictures", "samples"], []
    if any(each.class_score is not None for each in found.scores):
        heads.append(f"class score, {html.escape(found.extractor['name'])}")
        columns.append([_number(each.class_score, ".2f") for each in found.scores])
    if any(each.clip is not None for each in found.scores):
        heads.append("CLIP score")
        columns.append(
            [
                _number(each.clip, ".2f") + (f" ± {each.clip_error:.2f}" if each.clip_error else "")
                for each in found.scores
            ]
        )
    if not columns:
        return ""
    first = [(WORDS[each.pictures], str(each.samples)) for each in found.scores]
    rows = [(*names, *cells) for names, *cells in zip(first, *columns, strict=True)]
    note = (
        '<p class="note">Class score: exp of the mean KL divergence between the classes that the '
        "network sees in one picture and in all; the inception score’s formula on this network’s "
        "classes. It grows with the number of pictures.</p>"
    )
    return _table(heads, rows, [each.pictures != STUDENT for each in found.scores]) + note


def _worst(found: Evaluation, folder: Path) -> str:
    """Prompts by the mean PSNR of their samples, each with its worst one."""
    prompts: dict[str, list[SampleResult]] = {}
    for each in found.samples:
        prompts.setdefault(each.prompt, []).append(each)

    def closeness(rows: Iterable[SampleResult]) -> float:
        return float(np.mean([np.inf if r.student.psnr is None else r.student.psnr for r in rows]))

    order = sorted(prompts.values(), key=closeness)[:WORST]
    heads = ("prompt", "teacher", "student", "PSNR", "SSIM", "cosine", "ε-error")
    rows = []
    for samples in order:
        worst = min(samples, key=lambda each: closeness([each]))
        images = [_shrunk(folder, side, worst.index) for side in (TEACHER, STUDENT)]
        shown = [f'<img alt="" src="{report.data_uri(image)}">' for image in images]
        label = f"{html.escape(worst.prompt)}<br><span class=note>seed {worst.seed}</span>"
        rows.append(
            (
                label,
                *shown,
                "equal" if (db := closeness(samples)) == np.inf else f"{db:.1f} dB",
                f"{np.mean([each.student.ssim for each in samples]):.3f}",
                f"{np.mean([each.student.cosine for each in samples]):.3f}",
                f"{np.mean([each.epsilon_error for each in samples]):.2e}",
            )
        )
    note = (
        f'<p class="note">{len(order)} of {len(prompts)} prompts, by PSNR against the teacher’s '
        "picture from the same noise; numbers are means over the samples of a prompt, the pictures "
        "are of its worst one. All samples are in <code>samples.csv</code>.</p>"
    )
    return note + _table(heads, rows, kind="list")


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    grey: Sequence[bool] | None = None,
    kind: str = "dense",
) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        f"<tr{' class=floor' if faint else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for row, faint in zip(rows, grey or [False] * len(rows), strict=True)
    )
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _mean(found: Mean, form: str) -> str:
    if found.value is None:
        return "equal"
    return f"{found.value:{form}}" + ("" if found.error is None else f" ± {found.error:{form}}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _shrunk(folder: Path, side: str, index: int) -> Image.Image:
    """A picture as the page shows it: large ones are shrunk."""
    with Image.open(picture_of(folder, side, index), formats=("PNG",)) as file:
        image = file.convert("RGB")
    scale = SIDE / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _figure(figure: plots.Figure, words: str) -> str:
    return f'<p><img alt="{words}" src="{report.data_uri(render_figure(figure))}"></p>'
