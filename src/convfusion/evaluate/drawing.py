"""The pictures of an evaluation: drawn by teacher and student alike, in batches that resume.

    settings.json             what is drawn, and with which weights
    teacher/00000.png …       by the teacher
    student/00000.png …       by the student, from the same prompts and noises
    student/00000/000.png …   the frames of a clip, of which the former is a strip then
    teacher-other-seed/…      by the teacher from other noises: what chance alone does
    records/00000.json …      of each batch, how far the student strayed on its way, and the SHA-256
                              of its pictures

A batch counts as done when its record is there, which is written last, and its pictures are those
that it was written for: one that was damaged or replaced since is drawn again, with its batch.
Every file is written aside and renamed. Batches are the same whoever draws them, so a run that was
killed ends in the same bits, and so does one that several processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convfusion.clips import generate_clips
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.evaluate.drawn import digest_drawn, write_drawn
from convfusion.evaluate.epsilon import epsilon_errors, relative_error
from convfusion.evaluate.settings import EvaluationSettings
from convfusion.families import (
    Denoiser,
    denoiser_of,
    encode_conditioning,
    latent_scale,
    unpack_drawn,
)
from convfusion.families.patches import wrapped_method
from convfusion.files import read_json, write_text
from convfusion.fingerprint import shown
from convfusion.folders import LOCK, remove_remains
from convfusion.generate import generate, swapped_denoiser
from convfusion.schedule import noise_schedule

TEACHER, STUDENT, OTHER = "teacher", "student", "teacher-other-seed"
SIDES = (TEACHER, STUDENT, OTHER)
SETTINGS, RECORDS = "settings.json", "records"
MEASURED = {"trajectory", "trajectory_other_seed", "epsilon_errors"}
RECORDED = MEASURED | {"samples", "timesteps", "pictures"}
FORMAT = 3
SHOWN = 6  # differences that a message names
PATIENCE = 600  # seconds that a process waits for the first one to begin


def draw_pictures(
    pipe: Any,
    teacher: Denoiser,
    settings: EvaluationSettings,
    folder: Path,
    identity: dict[str, Any],
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]] | None:
    """Draw what is missing in a folder; the processes of a launcher share the batches.

    Args:
        pipe: the student's pipeline.
        teacher: the denoiser that it is compared with.
        settings: what to draw.
        folder: new, empty, or begun with the same settings.
        identity: as `identify_pictures` gives it.
        on_progress: called with the number of samples that are done in all.

    Returns:
        The record of every batch, once all are drawn; None in every process but the first.

    Raises:
        ConvFusionError: the folder holds something else, or what is drawn is not finite.
    """
    rank, processes = read_rank()
    begin_folder(folder, identity, rank)

    missing = settings.batches

    def count_missing() -> None:
        nonlocal missing
        missing = [rows for rows in missing if not _is_done(folder, settings, rows)]
        on_progress(len(settings) - sum(map(len, missing)))

    count_missing()
    for number, rows in enumerate(settings.batches):
        if number % processes == rank and rows in missing:
            _draw_batch(pipe, teacher, settings, rows, folder)
            count_missing()
    if rank:
        return None
    while missing:  # files tell, so no process waits at a barrier that may time out
        time.sleep(1)
        count_missing()
    return [read_json(_record_of(folder, rows)) for rows in settings.batches]


def read_rank() -> tuple[int, int]:
    """The number of this process among those that a launcher started, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def begin_folder(folder: Path, identity: dict[str, Any], rank: int = 0) -> None:
    """Write the settings of a new folder, or compare them with those of one that was begun.

    Raises:
        ConvFusionError: they differ, or the folder holds something else.
    """
    path = folder / SETTINGS
    patience = time.monotonic() + PATIENCE
    while rank and not path.is_file():
        if time.monotonic() > patience:
            raise ConvFusionError(f"the first process has not begun {folder}")
        time.sleep(0.2)
    check_place(folder, identity)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **identity}, indent=2, ensure_ascii=False)
        write_text(path, text + "\n")
    for name in (*SIDES, RECORDS):
        (folder / name).mkdir(exist_ok=True)
        remove_remains(folder / name)
    remove_remains(folder)


def check_place(folder: Path, identity: dict[str, Any]) -> None:
    """Raise a ConvFusionError unless a folder is new, or was begun with these settings."""
    path = folder / SETTINGS
    if path.is_file():
        try:
            held = read_json(path)
        except CheckpointError:
            raise ConvFusionError(f"{path} is damaged: choose another folder") from None
        wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
        if other := _list_differences(held, wanted):
            raise ConvFusionError(
                f"{folder} was begun with other settings ({'; '.join(other[:SHOWN])}"
                f"{'; …' if len(other) > SHOWN else ''}): choose another folder"
            )
        return
    # A run killed at its very start leaves the settings aside.
    left = folder.is_dir() and all(
        path.suffix == ".tmp" or path.name == LOCK for path in folder.iterdir()
    )
    if folder.exists() and not left:
        raise ConvFusionError(f"{folder} exists and is no evaluation: choose another folder")


def _list_differences(held: Any, wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of what differs, each with both values unless they are lists."""
    if not isinstance(held, dict):
        return [prefix.removesuffix(".") or "format"]
    names = []
    for key in sorted(wanted.keys() | held.keys()):
        before, now = held.get(key), wanted.get(key)
        if isinstance(now, dict):
            names += _list_differences(before, now, f"{prefix}{key}.")
        elif before != now:
            name = (prefix + key).removeprefix("settings.").removeprefix("rests_on.")
            many = isinstance(before, list | dict) or isinstance(now, list)
            names.append(name if many else f"{name} {shown(before)} then, {shown(now)} now")
    return names


@torch.no_grad()
def _draw_batch(
    pipe: Any, teacher: Denoiser, settings: EvaluationSettings, rows: range, folder: Path
) -> None:
    student = denoiser_of(pipe)
    prompts = [settings.prompts[i] for i in rows]
    seeds = [settings.seeds[i] for i in rows]
    others = [settings.other_seeds[i] for i in rows]
    paths = {}
    for side, denoiser, chosen in (
        (TEACHER, teacher, seeds),
        (STUDENT, student, seeds),
        (OTHER, teacher, others),
    ):
        with swapped_denoiser(pipe, denoiser), recorded_latents(pipe, len(rows)) as path:
            drawn = _draw(pipe, prompts, chosen, settings)
        if not all(latents.isfinite().all() for _, latents in path):
            raise ConvFusionError(
                f"what {side} draws from the seeds {chosen[0]} to {chosen[-1]} is not finite: "
                "try another --precision"
            )
        for i, each in zip(rows, drawn, strict=True):
            write_drawn(folder, side, i, each)
        paths[side] = path
    final = unpack_drawn(pipe, paths[TEACHER][-1][1], settings.size, settings.frames)
    errors = _measure_epsilon(pipe, teacher, settings, final, rows)
    if not np.isfinite(errors).all():
        raise ConvFusionError(
            f"the ε-error of the seeds {seeds[0]} to {seeds[-1]} is not finite: try another "
            "--precision"
        )
    record = {
        "samples": list(rows),
        "timesteps": [t for t, _ in paths[TEACHER]],
        "trajectory": _measure_straying(paths[STUDENT], paths[TEACHER]),
        "trajectory_other_seed": _measure_straying(paths[OTHER], paths[TEACHER]),
        "epsilon_errors": errors,
        "pictures": {side: _digest_pictures(folder, settings, side, rows) for side in SIDES},
    }
    write_text(_record_of(folder, rows), json.dumps(record) + "\n")


def _draw(pipe: Any, prompts: list[str], seeds: list[int], settings: EvaluationSettings) -> Any:
    """Pictures, or clips uint8 [T, H, W, 3], of prompts that are drawn at once."""
    options: dict[str, Any] = {
        "seeds": seeds,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": settings.size,
        "batch_size": len(seeds),
        "progress": False,
    }
    if settings.frames is None:
        return generate(pipe, prompts, **options)
    return generate_clips(pipe, prompts, frames=settings.frames, **options)


def _measure_straying(
    path: list[tuple[float, Tensor]], reference: list[tuple[float, Tensor]]
) -> list[list[float]]:
    """‖x̂_t − x_t‖²/‖x_t‖² of each sample after each step: [B][steps]."""
    pairs = zip(path, reference, strict=True)
    return torch.stack([relative_error(x, y).cpu() for (_, x), (_, y) in pairs]).T.tolist()


def _measure_epsilon(
    pipe: Any, teacher: Denoiser, settings: EvaluationSettings, latents: Tensor, rows: range
) -> list[list[float]]:
    """ε-errors of each sample at each timestep, on what the teacher drew: [B][T]."""
    scale = latent_scale(pipe)
    size = (latents.shape[-2] * scale, latents.shape[-1] * scale)
    noises = {
        t: torch.stack([_make_noise(latents[0], settings.seeds[i], t) for i in rows])
        for t in settings.timesteps
    }
    schedule = noise_schedule(pipe.scheduler, denoiser_of(pipe))
    conditioning = encode_conditioning(pipe, [settings.prompts[i] for i in rows], size)
    errors = epsilon_errors(denoiser_of(pipe), teacher, schedule, latents, noises, conditioning)
    return errors.T.tolist()


def _make_noise(like: Tensor, seed: int, timestep: int) -> Tensor:
    """Noise that depends on both numbers, and is not the one that a picture was drawn from."""
    mixed = int(np.random.SeedSequence((seed, timestep)).generate_state(1)[0])
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(mixed))


@contextmanager
def recorded_latents(pipe: Any, count: int) -> Iterator[list[tuple[float, Tensor]]]:
    """Keep (timestep, latents [count, C, …] after it) of every step while a pipeline settings.

    Every pipeline of diffusers asks its scheduler for each step. A DiT's batch is twice as large
    under guidance; its first half is kept.
    """
    path: list[tuple[float, Tensor]] = []

    def recording(step: Any, model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(model_output, timestep, *args, **kwargs)
        path.append((float(timestep), output[0][:count].float()))
        return output

    with wrapped_method(pipe.scheduler, "step", recording):
        yield path


def _record_of(folder: Path, rows: range) -> Path:
    return folder / RECORDS / f"{rows.start:05d}.json"


def _is_record(record: Any, settings: EvaluationSettings, rows: range) -> bool:
    """Whether this is a whole record of a batch, with finite numbers only."""
    if (
        not isinstance(record, dict)
        or not record.keys() >= RECORDED
        or record["samples"] != list(rows)
    ):
        return False
    try:
        timesteps = np.array(record["timesteps"], float)
        width = {"epsilon_errors": len(settings.timesteps)}
        return timesteps.ndim == 1 and all(
            values.shape == (len(rows), width.get(name, len(timesteps)))
            and np.isfinite(values).all()
            for name in MEASURED
            for values in (np.array(record[name], float),)
        )
    except (TypeError, ValueError):
        return False


def _is_done(folder: Path, settings: EvaluationSettings, rows: range) -> bool:
    """Whether the record of a batch is there and whole, and so are the pictures that it is of."""
    path = _record_of(folder, rows)
    try:
        record: Any = read_json(path) if path.exists() else None
        if not _is_record(record, settings, rows):
            return False
        return record["pictures"] == {
            side: _digest_pictures(folder, settings, side, rows) for side in SIDES
        }
    except CheckpointError:  # damaged, or missing
        return False


def _digest_pictures(
    folder: Path, settings: EvaluationSettings, side: str, rows: range
) -> list[str]:
    """The SHA-256 of each picture or clip of a batch."""
    return [digest_drawn(folder, side, index, settings.frames) for index in rows]
