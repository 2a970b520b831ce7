"""Signs of life: bars with the time left on a terminal, a plain line now and then elsewhere.

Everything goes to standard error, so that what a command prints can be piped. Inside of a bar's
work, bars that nobody asked for stay silent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL = 15.0  # seconds between two lines where there is no terminal

_open: list[Progress] = []  # those that are shown; the last one is the innermost


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def is_shown(progress: bool | None) -> bool:
    """Whether to show progress: as asked, or by default on a terminal that shows no other bar."""
    return is_terminal() and not _open if progress is None else progress


class Progress:
    """Bars on a terminal, or lines where standard error is none.

        with Progress() as progress:
            bar = progress.add("distilling", total=steps)
            bar.update(step)

    Args:
        shown: None shows bars on a terminal only, and not within another bar's work; True shows
            lines elsewhere too.
        interval: seconds between two lines where there is no terminal.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        shown: bool | None = None,
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shown = is_shown(shown)
        self.interval, self.clock = interval, clock
        self._rich: Any = None
        self._bars = 0
        if self.shown and is_terminal():
            self._rich = _rich_progress()

    def __enter__(self) -> Progress:
        if self.shown:
            _open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bars as they are, so that a message is printed below them."""
        if self in _open:
            _open.remove(self)
        if self._rich is not None:
            self._rich.stop()

    def add(self, name: str, total: int | None = None, done: int = 0) -> Bar:
        """A new bar, which appears at its first update.

        Args:
            name: what is being done, such as `distilling`.
            total: number of steps; None where it is not known yet.
            done: of them, those that lie behind, as in a run that goes on.
        """
        return Bar(self, name, total, done)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if self._rich is not None:
            self._rich.console.print(text, highlight=False)
        elif self.shown:
            _print_line(text)


class Bar:
    """One piece of work; see `Progress.add`."""

    def __init__(self, progress: Progress, name: str, total: int | None, done: int) -> None:
        self.progress, self.name, self.total, self.done = progress, name, total, done
        self._before = done  # the time left is estimated by what was done since the start
        self._started = self._last = progress.clock()
        self._printed = False
        self._task: Any = None

    def update(
        self, done: int | None = None, *, total: int | None = None, name: str | None = None
    ) -> None:
        """Show how much is done; another name or total replaces the one before."""
        if done is not None and done < self.done:  # other work begins under the same bar
            self._before, self._started = done, self.progress.clock()
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.name = self.name if name is None else name
        if not self.progress.shown:
            return
        if self.progress._rich is not None:
            self._draw(self.progress._rich)
        else:
            self._print_now_and_then()

    def advance(self, by: int = 1) -> None:
        """Count further steps."""
        self.update(self.done + by)

    def _draw(self, bars: Any) -> None:
        if self._task is None:
            bars.start()  # not before something is done: a refusal before that is one line
            self._task = bars.add_task(self.name, total=self.total, completed=self._before)
        bars.update(self._task, description=self.name, total=self.total, completed=self.done)

    def _print_now_and_then(self) -> None:
        now = self.progress.clock()
        finished = self.total is not None and self.done >= self.total
        if now - self._last >= self.progress.interval or (finished and self._printed):
            self._last, self._printed = now, not finished
            _print_line(self.describe(now))

    def describe(self, now: float) -> str:
        """The bar in words: `distilling: 120 of 400, 0:02:20 left`."""
        if self.total is None:
            return f"{self.name}: {self.done:,} done, {_duration(now - self._started)} so far"
        text = f"{self.name}: {self.done:,} of {self.total:,}"
        done_here = self.done - self._before
        if self.done >= self.total:
            return f"{text}, {_duration(now - self._started)} in all"
        if done_here <= 0:
            return text
        left = (now - self._started) / done_here * (self.total - self.done)
        return f"{text}, {_duration(left)} left"


@contextmanager
def announced(text: str, shown: bool | None = None) -> Iterator[None]:
    """Say what begins, such as "Loading mini …": a spinner on a terminal, a line elsewhere."""
    if not is_shown(shown):
        yield
    elif is_terminal() and not _open:
        with _error_console().status(text):
            yield
    else:
        _print_line(text)
        yield


def _error_console() -> Console:
    """Standard error, on which text is text: names may look like markup or emoji codes."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False)


def _rich_progress() -> Any:
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        console=_error_console(),
    )


def _print_line(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
