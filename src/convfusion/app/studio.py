"""One model that several visitors draw with, one at a time: its teacher, its student, no attention.

Nothing that a visitor chooses stays in the model. What a visitor has drawn is the visitor's.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from convfusion.analysis.capture import (
    DenoiserCall,
    counted_calls,
    recorded_calls,
    visited_timesteps,
)
from convfusion.errors import ConvFusionError
from convfusion.evaluate.images import psnr
from convfusion.families import Denoiser, Site, denoiser_of, family_of, list_sites, native_size
from convfusion.families.watch import watch_attention
from convfusion.generate import check_drawing, generate, swapped_denoiser
from convfusion.mixers import Removed
from convfusion.mixers.tokens import TokenSample
from convfusion.surgery import attention_back, attention_teacher, convert, mixers_of
from convfusion.surgery.config import uniform

TEACHER, STUDENT, REMOVED = "teacher", "student", "removed"
SIDES = (TEACHER, STUDENT, REMOVED)
LARGEST = 4  # times the model's own side: a slip of the finger must not fill the memory
MOST_STEPS = 250  # of a picture


class Stopped(Exception):
    """A job was stopped by the one who began it."""


@dataclass
class Job:
    """Something that is being drawn, until it is stopped."""

    stopped: bool = False

    def check(self) -> None:
        """Raise `Stopped` once it is."""
        if self.stopped:
            raise Stopped


@dataclass(frozen=True)
class Wish:
    """What a visitor wants drawn.

    Attributes:
        prompt: text; for DiT a class name or number.
        seed: of the noise.
        steps: of sampling.
        guidance: classifier-free guidance scale; 1 or less is none.
        size: (height, width) in pixels.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Drawn:
    """A picture, and how it came about.

    Attributes:
        image: as the pipeline gave it.
        seconds: that the pipeline took for it, from prompt to pixels.
        calls: of the denoiser, in order; of the teacher alone.
    """

    image: Image.Image
    seconds: float
    calls: list[DenoiserCall] = field(default_factory=list)


class Studio:
    """A converted pipeline, its teacher and the same model without any self-attention.

    All three share every weight. A model that is not converted has no student of its own: with
    `Removed` at every site, the student is what some of its attention, given back, draws.

    Args:
        pipe: a pipeline whose attention is kept; it belongs to the studio from now on.
        name: what it is called.
        guidance: that it draws with by default.

    Attributes:
        has_blocks: whether the student has blocks, and is not the model without self-attention.
        teacher: the denoiser with its self-attention.
        removed: and without any.
        sides: that a comparison has.
        labels: a short name of every site, by its path.
        warms_up: whether a few steps go before the first picture of a side and size, so that the
            seconds of the teacher, which is the first, can be compared.

    Raises:
        ConvFusionError: there is no attention to compare with.
    """

    def __init__(self, pipe: Any, name: str, guidance: float = 5.0) -> None:
        self.has_blocks = bool(mixers_of(pipe))
        if not self.has_blocks:
            convert(pipe, uniform(Removed()))
        self.pipe, self.name, self.guidance = pipe, name, guidance
        self.teacher = attention_teacher(denoiser_of(pipe))
        self.removed = attention_teacher(denoiser_of(pipe))
        convert(self.removed, uniform(Removed()))
        self.sides = SIDES if self.has_blocks else (TEACHER, STUDENT)
        self.labels = label_sites([site.path for site in list_sites(self.teacher)])
        self.warms_up = denoiser_of(pipe).device.type != "cpu"
        self._warm: set[tuple[str, tuple[int, int]]] = set()
        self._lock = threading.Lock()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained on."""
        return native_size(self.pipe)

    @property
    def fixed_size(self) -> bool:
        """Whether it draws at this size only."""
        return family_of(denoiser_of(self.pipe)).fixed_size

    @property
    def converted(self) -> dict[str, str]:
        """The label of every converted site, by its path."""
        return {path: self.labels[path] for path in self.labels if path in mixers_of(self.pipe)}

    def check(self, wish: Wish) -> None:
        """Raise a ConvFusionError unless this can be drawn; see `generate`."""
        if not wish.prompt.strip():
            raise ConvFusionError("there is no prompt: write what to draw")
        if wish.steps > MOST_STEPS:
            raise ConvFusionError(f"at most {MOST_STEPS} steps are drawn here, not {wish.steps}")
        most = [LARGEST * side for side in self.size]
        if any(side > limit for side, limit in zip(wish.size, most, strict=True)):
            raise ConvFusionError(
                f"{wish.size[1]}×{wish.size[0]} is too large for this page, which draws up to "
                f"{most[1]}×{most[0]}"
            )
        check_drawing(
            self.pipe, [wish.prompt], [wish.seed], wish.steps, wish.guidance, wish.size, 1, {}
        )

    def draw(
        self,
        side: str,
        wish: Wish,
        job: Job,
        *,
        given_back: Collection[str] = (),
        on_step: Callable[[int, int], None] = lambda step, steps: None,
    ) -> Drawn:
        """Draw a picture, after those that others are drawing.

        Args:
            side: `teacher`, `student` or `removed`.
            wish: what to draw.
            job: ends the drawing when it is stopped.
            given_back: paths of converted sites of the student whose attention stands this time.
            on_step: called with the number of denoiser calls that are done, and of all.

        Raises:
            Stopped: the job was stopped.
            ConvFusionError: this cannot be drawn, or a path is no converted site.
        """
        self.check(wish)
        done, timesteps = 0, list[float]()

        def count() -> None:
            nonlocal done
            done += 1
            job.check()
            on_step(done, len(timesteps))

        with self._alone(job), self._standing(side, given_back) as model:
            self._warm_up(side, wish)
            draw = partial(self._generate, wish, wish.steps)
            timesteps += visited_timesteps(self.pipe, wish.steps, draw)
            watched = recorded_calls(self.pipe, timesteps if side == TEACHER else [])
            with watched as calls, counted_calls(model, count):
                started = time.perf_counter()
                image = draw()
                seconds = time.perf_counter() - started
        return Drawn(image, seconds, calls)

    def _generate(self, wish: Wish, steps: int) -> Image.Image:
        return generate(
            self.pipe,
            [wish.prompt],
            seeds=[wish.seed],
            steps=steps,
            guidance=wish.guidance,
            size=None if self.fixed_size else wish.size,
            progress=False,
        )[0]

    def _warm_up(self, side: str, wish: Wish) -> None:
        """Draw some steps before the first picture of a kind: a GPU prepares itself once."""
        kind = (side, wish.size)
        if self.warms_up and kind not in self._warm:
            self._generate(wish, min(2, wish.steps))
        self._warm.add(kind)

    def follow(
        self, side: str, wish: Wish, job: Job, given_back: Collection[str] = ()
    ) -> Iterator[tuple[int, int] | Drawn]:
        """Draw a picture, and tell how far it is: the steps done and of all, then the picture.

        It is drawn in a thread of its own, and stops when nobody follows any more. Arguments and
        errors are those of `draw`.
        """
        events: SimpleQueue[Any] = SimpleQueue()

        def work() -> None:
            def tell(step: int, steps: int) -> None:
                events.put((step, steps))

            try:
                events.put(self.draw(side, wish, job, given_back=given_back, on_step=tell))
            except BaseException as error:
                events.put(error)

        threading.Thread(target=work, daemon=True).start()
        event = None
        try:
            while not isinstance(event, Drawn):
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
        except GeneratorExit:
            job.stopped = True
            raise

    @torch.no_grad()
    def repeat(self, call: DenoiserCall, see: Callable[[Site, Any, TokenSample], None]) -> None:
        """Call the teacher once more with what it was given, and show what its attention is given.

        Args:
            call: of the teacher, from `Drawn.calls`.
            see: as for `convfusion.families.watch.watch_attention`.
        """
        with self._alone(Job()), watch_attention(self.teacher, see):
            self.teacher(*call.args, **call.kwargs)

    @contextmanager
    def _alone(self, job: Job) -> Iterator[None]:
        """Wait until nobody else uses the model, or the job is stopped."""
        while not self._lock.acquire(timeout=0.1):
            job.check()
        try:
            job.check()
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _standing(self, side: str, given_back: Collection[str]) -> Iterator[Denoiser]:
        """Let the pipeline draw as one side of the comparison for a while."""
        if side == STUDENT:
            with attention_back(self.pipe, given_back):
                yield denoiser_of(self.pipe)
        else:
            model = self.teacher if side == TEACHER else self.removed
            with swapped_denoiser(self.pipe, model):
                yield model


def measure_psnr(drawn: Drawn, reference: Drawn) -> float:
    """PSNR of two pictures of one size in dB; infinite if they are equal."""
    return psnr(drawn.image, reference.image)


def label_sites(paths: list[str]) -> dict[str, str]:
    """A short name for every site: what its path says beside the words that all paths share."""
    words = r"_blocks?|\.?(attentions|transformer_blocks|blocks|attn1)"
    short = {path: re.sub(words, "", path).strip(".") for path in paths}
    return (
        short
        if len(set(short.values())) == len(short) and all(short.values())
        else dict(zip(paths, paths, strict=True))
    )


def parse_wish(
    prompt: str | None,
    seed: float | None,
    steps: float | None,
    guidance: float | None,
    size: tuple[float | None, float | None],
) -> Wish:
    """What the fields of the page ask for.

    Args:
        prompt: as it was typed.
        seed, steps: whole numbers.
        guidance: any number.
        size: (height, width), whole numbers.

    Raises:
        ConvFusionError: a field is empty, or a number has a fraction where none may be.
    """
    return Wish(
        (prompt or "").strip(),
        _whole("seed", seed),
        _whole("number of steps", steps),
        _number("guidance", guidance),
        (_whole("height", size[0]), _whole("width", size[1])),
    )


def _number(name: str, value: float | None) -> float:
    if value is None:
        raise ConvFusionError(f"the {name} is missing")
    return float(value)


def _whole(name: str, value: float | None) -> int:
    if _number(name, value) != int(_number(name, value)):
        raise ConvFusionError(f"the {name} must be a whole number, not {value}")
    return int(value or 0)
