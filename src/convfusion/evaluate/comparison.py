"""Several sets of trained blocks side by side: what each draws, and how close to its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from convfusion import checkpoint
from convfusion.evaluate.images import mean_psnr
from convfusion.evaluate.scores import Mean
from convfusion.generate import generate
from convfusion.report import draw_grid, format_psnr
from convfusion.surgery import mixers_of, revert

OWN, TEACHER = "own blocks", "teacher"


@dataclass(frozen=True)
class Comparison:
    """What teacher and students draw from equal prompts and seeds.

    Attributes:
        captions: of each column: its prompt, and its seed where there are several.
        rows: pictures by name, the teacher's first.
        psnr: of each student's row to the teacher's, in dB, with its standard error.
    """

    captions: list[str]
    rows: dict[str, list[Image.Image]]
    psnr: dict[str, Mean]

    def grid(self, columns: int | None = None) -> Image.Image:
        """All pictures in one, each student's row labelled with its PSNR.

        Args:
            columns: after so many, all rows go on below; None is never.
        """
        labels = {}
        for name, images in self.rows.items():
            psnr = format_psnr(*self.psnr[name]) if name in self.psnr else ""
            unbroken = psnr.replace(" ", "\N{NO-BREAK SPACE}")
            labels[f"{name} {unbroken}".strip()] = images
        return draw_grid(labels, self.captions, columns)


def compare_blocks(
    pipe: Any,
    students: Mapping[str, str | Path],
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
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
        progress: as for `generate`.
        settings: further arguments of `generate`.

    Raises:
        ConvFusionError: as for `generate` and `checkpoint.load`; or the attention was dropped.
    """
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = list(seeds) * len(prompts)

    def draw() -> list[Image.Image]:
        return generate(pipe, texts, seeds=numbers, progress=progress, **settings)

    drawn: dict[str, list[Image.Image]] = {}
    if mixers_of(pipe):
        drawn[OWN] = draw()
        revert(pipe)
    rows = {TEACHER: draw(), **drawn}
    for name, blocks in students.items():
        checkpoint.load(pipe, blocks)
        rows[name] = draw()
        revert(pipe)
    psnr = {
        name: mean_psnr(images, rows[TEACHER], texts)
        for name, images in rows.items()
        if name != TEACHER
    }
    told = [f", seed {seed}" if len(seeds) > 1 else "" for seed in numbers]
    captions = [f"{text}{seed}" for text, seed in zip(texts, told, strict=True)]
    return Comparison(captions, rows, psnr)
