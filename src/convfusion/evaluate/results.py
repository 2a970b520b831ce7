"""What an evaluation found, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.evaluate.drawing import OTHER, STUDENT, TEACHER
from convfusion.evaluate.images import mean_of_psnr
from convfusion.evaluate.measure import Curves, Distribution, Likeness, SampleResult, SetScores
from convfusion.evaluate.motion import Motion, sum_up_motion
from convfusion.evaluate.scores import mean_of
from convfusion.files import read_json, write_csv, write_text

SCHEMA = "convfusion-evaluation-1"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        student: what the report calls the student.
        teacher: and its teacher.
        settings: how pictures were drawn: steps, guidance, size, batch_size.
        model: fingerprints of weights and scheduler.
        extractor: name, width, side and fingerprint of the network behind the features.
        clip: name and fingerprint of the CLIP model, or None.
        real: name, samples and skipped of the real pictures, or None.
        samples: every prompt and seed.
        curves: means by timestep and by step.
        distributions: sets of pictures against references.
        scores: of each set by itself.
        motion: of clips; None of pictures.
    """

    student: str
    teacher: str
    settings: dict[str, Any]
    model: dict[str, Any]
    extractor: dict[str, Any]
    clip: dict[str, Any] | None
    real: dict[str, Any] | None
    samples: list[SampleResult]
    curves: Curves
    distributions: list[Distribution]
    scores: list[SetScores]
    motion: Motion | None = None

    @property
    def noun(self) -> str:
        """What was drawn, in a report's words."""
        return "pictures" if self.motion is None else "clips"

    @property
    def error_name(self) -> str:
        """What a report calls the error of the denoiser's output."""
        return "velocity error" if self.settings.get("predicts") == "velocity" else "ε-error"

    @property
    def error_formula(self) -> str:
        """That error in symbols."""
        return "‖v̂ − ṽ‖² / ‖ṽ‖²" if "velocity" in self.error_name else "‖ε̂ − ε̃‖² / ‖ε̃‖²"

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`, `evaluation.csv`, `samples.csv` and, of clips, `frames.csv`."""
        from convfusion import __version__

        content = {"schema": SCHEMA, "version": __version__, **asdict(self)}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(folder / "evaluation.json", text + "\n")
        rows = list_metrics(self)
        write_csv(folder / "evaluation.csv", list(rows[0]), rows)
        samples = [_flatten(sample) for sample in self.samples]
        if self.motion is not None:
            samples = [row | _list_motion(self.motion, i) for i, row in enumerate(samples)]
            frames = list_frames(self.motion)
            write_csv(folder / "frames.csv", list(frames[0]), frames)
        write_csv(folder / "samples.csv", list(samples[0]), samples)


def list_metrics(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every number that sums up an evaluation, as the rows of `evaluation.csv`."""
    rows: list[dict[str, Any]] = []
    count = len(evaluation.samples)

    def add(
        metric: str, pictures: str, reference: str, value: float | None, error: float | None = None
    ) -> None:
        if value is not None:
            rows.append(
                {
                    "metric": metric,
                    "pictures": pictures,
                    "reference": reference,
                    "value": value,
                    "standard_error": error,
                    "samples": counts.get(pictures, count),
                    "reference_samples": counts.get(reference),
                    "network": networks.get(metric, evaluation.extractor["name"]),
                }
            )

    # What no network is asked for, and what another one than the extractor is.
    networks = dict.fromkeys(("epsilon_error", "latent_error", "psnr", "ssim"), "")
    networks["clip_score"] = evaluation.clip["name"] if evaluation.clip else ""
    counts = {each.pictures: each.samples for each in evaluation.scores}
    prompts = [each.prompt for each in evaluation.samples]
    for name in ("epsilon_error", "latent_error"):
        values = [getattr(each, name) for each in evaluation.samples]
        add(name, STUDENT, TEACHER, *mean_of(values, prompts))
    add("latent_error", OTHER, TEACHER, evaluation.curves.latent_errors_other_seed[-1])
    for side, name in ((STUDENT, "student"), (OTHER, "other_seed")):
        alike = [getattr(each, name) for each in evaluation.samples]
        add("psnr", side, TEACHER, *mean_of_psnr([each.psnr for each in alike], prompts))
        for metric in ("ssim", "cosine"):
            values = [getattr(each, metric) for each in alike]
            add(metric, side, TEACHER, *mean_of(values, prompts))
    for row in evaluation.distributions:
        add("frechet_distance", row.pictures, row.reference, row.frechet)
        add("kernel_distance", row.pictures, row.reference, row.kid, row.kid_error)
        excess = row.kid_excess, row.kid_excess_error
        add("excess_kernel_distance", row.pictures, row.reference, *excess)
        for metric in ("precision", "recall", "density", "coverage"):
            add(metric, row.pictures, row.reference, getattr(row, metric))
    if evaluation.motion is not None:
        for name, pictures, reference, mean in sum_up_motion(evaluation.motion, prompts):
            networks[name] = ""
            add(name, pictures, reference, *mean)
    for each in evaluation.scores:
        add("class_score", each.pictures, "", each.class_score)
        add("clip_score", each.pictures, "prompts", each.clip, each.clip_error)
    return rows


def list_frames(motion: Motion) -> list[dict[str, Any]]:
    """The PSNR of each frame, as the rows of `frames.csv`."""
    return [
        {"frame": number, "pictures": side, "psnr": value, "standard_error": error}
        for side, values in motion.frame_psnr.items()
        for number, (value, error) in enumerate(
            zip(values, motion.frame_psnr_error[side], strict=True)
        )
    ]


def _list_motion(motion: Motion, index: int) -> dict[str, float]:
    """The columns of `samples.csv` on how a clip moves."""
    sides = {STUDENT: "student", TEACHER: "teacher", OTHER: "other_seed"}
    return {
        f"{words}_{name}": getattr(motion, name)[side][index]
        for side, words in sides.items()
        for name in ("change", "flicker")
    }


def _flatten(row: SampleResult) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for key, value in asdict(row).items():
        if isinstance(value, dict):
            columns |= {f"{key}_{name}": inner for name, inner in value.items()}
        else:
            columns[key] = value
    return columns


def read_samples(folder: Path) -> tuple[str, list[SampleResult]]:
    """What the student of a finished evaluation is called, and every sample, from its folder.

    Raises:
        ConvFusionError: there is no `evaluation.json`, it is of another kind, or it is damaged.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ConvFusionError(
            f"{folder} holds no finished evaluation: `convfusion evaluate --out {folder}` makes one"
        )
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConvFusionError(f"{path} is no evaluation of this version ({SCHEMA})")
    try:
        samples = [_read_sample(row) for row in content["samples"]]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise CheckpointError(f"{path} is damaged: its samples are not as written") from None
    return str(content.get("student", "student")), samples


def _read_sample(row: dict[str, Any]) -> SampleResult:
    def read(side: dict[str, Any]) -> Likeness:
        psnr = None if side["psnr"] is None else float(side["psnr"])
        return Likeness(psnr, float(side["ssim"]), float(side["cosine"]))

    return SampleResult(
        index=int(row["index"]),
        prompt=str(row["prompt"]),
        seed=int(row["seed"]),
        student=read(row["student"]),
        other_seed=read(row["other_seed"]),
        epsilon_error=float(row["epsilon_error"]),
        latent_error=float(row["latent_error"]),
    )
