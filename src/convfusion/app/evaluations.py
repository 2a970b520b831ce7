"""The pictures of an evaluation folder, the worst first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convfusion.errors import ConvFusionError
from convfusion.evaluate.drawing import SIDES, STUDENT, TEACHER
from convfusion.evaluate.drawn import picture_of
from convfusion.evaluate.measure import SampleResult
from convfusion.evaluate.results import read_samples
from convfusion.text import one_line

THUMBNAIL = 128  # pixels of a picture in the gallery
GAP = 4  # pixels between the two
PAGE = 24  # samples that are shown at once
LABEL = 60  # characters of a prompt below its pictures


@dataclass(frozen=True)
class Gallery:
    """The samples of an evaluation.

    Attributes:
        folder: that `convfusion evaluate` wrote.
        student: what it is called.
        samples: the one that is farthest from its teacher's first.
    """

    folder: Path
    student: str
    samples: list[SampleResult]

    @property
    def pages(self) -> int:
        """How many pages of `PAGE` samples there are."""
        return math.ceil(len(self.samples) / PAGE)

    def on_page(self, page: int) -> list[SampleResult]:
        """The samples of a page; the first is 1."""
        return self.samples[(page - 1) * PAGE : page * PAGE]

    def show_pair(self, sample: SampleResult) -> tuple[Image.Image, str]:
        """A thumbnail of teacher and student side by side, and the words below it."""
        images = [self.read_side(side, sample) for side in (TEACHER, STUDENT)]
        scale = THUMBNAIL / max(images[0].size)
        width, height = (max(1, round(side * scale)) for side in images[0].size)
        how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        pair = Image.new("RGB", (2 * width + GAP, height), "white")
        for number, image in enumerate(images):
            pair.paste(image.resize((width, height), how), (number * (width + GAP), 0))
        prompt = one_line(sample.prompt)
        short = prompt if len(prompt) <= LABEL else f"{prompt[: LABEL - 1]}…"
        return pair, f"{_format_psnr(sample)} · {short}"

    def read_sides(self, sample: SampleResult) -> dict[str, Image.Image]:
        """The teacher's, the student's and the teacher's picture from other noise, as they are."""
        return {side: self.read_side(side, sample) for side in SIDES}

    def read_side(self, side: str, sample: SampleResult) -> Image.Image:
        """A picture as it is.

        Raises:
            ConvFusionError: it is missing or damaged.
        """
        path = picture_of(self.folder, side, sample.index)
        try:
            with Image.open(path, formats=("PNG",)) as file:
                return file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ConvFusionError(f"the picture {path} is missing or damaged") from None


def open_gallery(folder: str) -> Gallery:
    """The samples of an evaluation by the PSNR of the student's picture, lowest first.

    Raises:
        ConvFusionError: there is no finished evaluation in the folder.
    """
    if not folder.strip():
        raise ConvFusionError("name the folder of an evaluation, as `convfusion evaluate` wrote it")
    path = Path(folder.strip()).expanduser()
    if not path.is_dir():
        raise ConvFusionError(f"there is no folder {path}")
    student, samples = read_samples(path)
    return Gallery(path, student, sorted(samples, key=_closeness))


def describe_sample(sample: SampleResult) -> str:
    """The numbers of a sample, in Markdown without its prompt."""
    other = sample.other_seed.psnr
    return (
        f"seed {sample.seed} · PSNR {_format_psnr(sample)}, SSIM {sample.student.ssim:.3f}, "
        f"ε-error {sample.epsilon_error:.2e}"
        + ("" if other is None else f" · the teacher from another noise: PSNR {other:.1f} dB")
    )


def _closeness(sample: SampleResult) -> float:
    return math.inf if sample.student.psnr is None else sample.student.psnr


def _format_psnr(sample: SampleResult) -> str:
    return "equal" if sample.student.psnr is None else f"{sample.student.psnr:.1f} dB"
