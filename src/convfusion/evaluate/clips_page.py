"""What the report of an evaluation shows of clips, beside what it shows of pictures, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convfusion import report
from convfusion.data.clips import draw_strip, read_clip, spread_frames
from convfusion.evaluate import plots
from convfusion.evaluate.drawing import OTHER, STUDENT, TEACHER
from convfusion.evaluate.drawn import clip_of
from convfusion.evaluate.motion import Motion, ratio_of_means
from convfusion.evaluate.results import Evaluation
from convfusion.evaluate.scores import mean_of
from convfusion.evaluate.verdict import format_mean, format_ratio

COLUMNS = 5  # clips that move side by side
STRIPS = 4  # of them, those whose strips are shown as well
MOVING = 24  # frames of a clip that moves on the page, at most
SIDE = 128  # of a frame on the page, in pixels
WORDS = {TEACHER: "teacher", STUDENT: "student", OTHER: "teacher, other noises"}


def describe_size(settings: Mapping[str, Any]) -> str:
    """The size of what was drawn: `64×64`, or `17 frames of 64×64`."""
    height, width = settings["size"]
    frames = settings.get("frames")
    return f"{width}×{height}" if frames is None else f"{frames} frames of {width}×{height}"


def show_clips(evaluation: Evaluation, folder: Path) -> str:
    """Clips of each side: moving beside each other, then their strips below each other."""
    count = min(COLUMNS, len(evaluation.samples))
    places = [int((i + 0.5) * len(evaluation.samples) / count) for i in range(count)]
    chosen = [evaluation.samples[place] for place in places]
    prompts = [sample.prompt for sample in chosen]
    total = evaluation.settings["frames"]
    clips = {
        words: [_read_small(clip_of(folder, side, sample.index), total) for sample in chosen]
        for side, words in WORDS.items()
    }
    shown = spread_frames(total, MOVING)
    sheets = [_draw_moment(clips, prompts, number) for number in shown]
    rate = evaluation.settings["frame_rate"] * len(shown) / total
    strips = {words: [draw_strip(clip) for clip in row[:STRIPS]] for words, row in clips.items()}
    sheet = report.draw_grid(strips, prompts[:STRIPS], columns=1)
    return (
        report.show_animation(sheets, rate, "Clips by prompt and model, moving")
        + "<p>Frames of the first of these clips, from the first to the last:</p>"
        + report.show_picture(sheet, "Strips of frames by prompt and model")
    )


def _draw_moment(
    clips: Mapping[str, Sequence[np.ndarray]], prompts: Sequence[str], number: int
) -> Image.Image:
    """A grid of one frame of all clips."""
    rows = {words: [Image.fromarray(clip[number]) for clip in row] for words, row in clips.items()}
    return report.draw_grid(rows, prompts)


def show_motion(evaluation: Evaluation, motion: Motion) -> str:
    """How much clips change and flicker, and how close each frame is to the teacher's."""
    prompts = [sample.prompt for sample in evaluation.samples]
    rows = []
    for name, words in (
        ("flicker", "flicker, |v[t] − (v[t−1] + v[t+1])/2|"),
        ("change", "change, |v[t+1] − v[t]|"),
    ):
        values = getattr(motion, name)
        cells = [format_mean(mean_of(values[side], prompts), ".2f") for side in WORDS]
        ratios = (ratio_of_means(values[s], values[TEACHER], prompts) for s in (STUDENT, OTHER))
        rows.append((words, *cells, *map(format_ratio, ratios)))
    heads = ("", *WORDS.values(), "student / teacher", "other noises / teacher")
    return (
        "<h2>From frame to frame</h2>"
        + report.show_table(heads, rows, kind="dense")
        + '<p class="note">Means over frames, pixels and colours, of values of 0 … 255. What moves '
        "changes; flicker is what changes and goes back, and motion has some of it, too, at edges "
        "that pass by. The ratios are of means, ± standard error over prompts: 1 is as much as the "
        "teacher, and the last column shows how far chance takes the teacher from itself.</p>"
        "<p>PSNR against the teacher’s clip, frame by frame, with a band of one standard error.</p>"
        + report.show_picture(report.render_figure(plots.frame_psnrs(motion)), "PSNR by frame")
    )


def _read_small(path: Path, frames: int) -> np.ndarray:
    """A clip as the page shows it: shrunk if it is large, and with larger pixels if it is small."""
    clip = read_clip(path, frames)
    longest = max(clip.shape[1:3])
    if longest <= SIDE:
        scale = SIDE // longest
        return clip.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = (max(1, round(side * SIDE / longest)) for side in clip.shape[1:3])
    pictures = (Image.fromarray(frame) for frame in clip)
    return np.stack(
        [np.array(p.resize((width, height), Image.Resampling.LANCZOS)) for p in pictures]
    )
