"""Several sets of trained blocks side by side: what each draws, and how close to its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from convfusion import checkpoint
from convfusion.checkpoint.card import name_kinds
from convfusion.clips import generate_clips
from convfusion.data.clips import draw_strip
from convfusion.evaluate.images import mean_clip_psnr, mean_psnr
from convfusion.evaluate.scores import Mean
from convfusion.generate import generate
from convfusion.mixers import Removed, mixer_to_dict
from convfusion.report import draw_grid, format_psnr
from convfusion.surgery import convert, mixers_of, revert, status, uniform

TEACHER, REMOVED = "teacher (self-attention)", "self-attention removed"


@dataclass(frozen=True)
class Comparison:
    """What teacher and students draw from equal prompts and seeds.

    Attributes:
        captions: of each column: its prompt, and its seed where there are several.
        rows: pictures by name, the teacher's first; of clips the strips of their frames.
        psnr: of each student's row to the teacher's, in dB, with its standard error.
    """

    captions: list[str]
    rows: dict[str, list[Image.Image]]
    psnr: dict[str, Mean]

    def grid(self, columns: int | None = None) -> Image.Image:
        """All pictures in one, each student's row labelled, first with its PSNR.

        Args:
            columns: after so many, all rows go on below; None is never.
        """
        notes = {name: format_psnr(*psnr) for name, psnr in self.psnr.items()}
        return draw_grid(self.rows, self.captions, columns, notes)


def compare_blocks(
    pipe: Any,
    students: Mapping[str, str | Path],
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    removed: bool = False,
    frames: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Comparison:
    """Draw every prompt from every seed with the attention of a pipeline and with trained blocks.

    Args:
        pipe: not converted; or converted with its attention kept, and then its blocks are a
            student too. In the end it is not converted.
        students: trained blocks by the name of their row, as `checkpoint.load` takes them.
        prompts: what to draw.
        seeds: every prompt is drawn from each of them.
        removed: draw them without self-attention too, which shows what the blocks are for.
        frames: of clips, where a pipeline draws videos; None draws pictures.
        progress: as for `generate`.
        settings: further arguments of `generate`, or of `generate_clips`.

    Raises:
        ConvFusionError: as for `generate` and `checkpoint.load`; or the attention was dropped.
    """
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = list(seeds) * len(prompts)

    def draw() -> list[Any]:
        told = {"seeds": numbers, "progress": progress, **settings}
        if frames is None:
            return generate(pipe, texts, **told)
        return generate_clips(pipe, texts, frames=frames, **told)

    drawn: dict[str, list[Any]] = {}
    if mixers_of(pipe):
        drawn[name_own(pipe)] = draw()
        revert(pipe)
    rows = {TEACHER: draw(), **drawn}
    for name, blocks in students.items():
        checkpoint.load(pipe, blocks)
        rows[name] = draw()
        revert(pipe)
    if removed:
        convert(pipe, uniform(Removed()))
        rows[REMOVED] = draw()
        revert(pipe)
    measure = mean_psnr if frames is None else mean_clip_psnr
    psnr = {
        name: measure(each, rows[TEACHER], texts) for name, each in rows.items() if name != TEACHER
    }
    if frames is not None:
        rows = {name: [draw_strip(clip) for clip in clips] for name, clips in rows.items()}
    told = [f", seed {seed}" if len(seeds) > 1 else "" for seed in numbers]
    captions = [f"{text}{seed}" for text, seed in zip(texts, told, strict=True)]
    return Comparison(captions, rows, psnr)


def name_own(pipe: Any) -> str:
    """What stands in a converted pipeline, in a few words: `halo blocks (no self-attention)`."""
    state = status(pipe)
    kinds = [mixer_to_dict(site.mixer)["kind"] for site in state.sites if site.mixer is not None]
    told = name_kinds([kind for kind in kinds if kind != "mean_only"] or kinds)
    whole = state.converted == len(state.sites)
    rest = "no self-attention" if whole else f"at {state.converted} of {len(state.sites)} sites"
    return f"{told} ({rest})"
