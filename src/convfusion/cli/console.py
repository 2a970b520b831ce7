"""What the command line shows on a terminal."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from convfusion.quiet import keep_quiet

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # exit status after Ctrl-C


def fail(message: str, status: int = 2) -> NoReturn:
    """Say what is wrong in one line, and leave."""
    print(f"convfusion: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def steady_streams() -> None:
    """Print `?` for what an output cannot show, as of code page 1252 or a name that is no text."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream that is closed is None
            stream.reconfigure(errors="replace")


def console(*, stderr: bool = False) -> Console:
    """A terminal for tables, on which text is text: names may look like markup or emoji codes."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


def print_ending(*paths: str | Path, verdict: str = "", next_command: Sequence[Any] = ()) -> None:
    """End a command: what came of it in words, the files with their sizes, and what to type next.

    Args:
        paths: files and folders that were written.
        verdict: a sentence about the result.
        next_command: words of a command, which are quoted where a shell needs that.
    """
    if verdict:
        print(verdict)
    for path in paths:
        print(f"Written: {path} ({format_bytes(measure_size(Path(path)))})")
    if next_command:
        print(f"Next: {shlex.join(map(str, next_command))}")


def measure_size(path: Path) -> int:
    """Bytes of a file, or of all files within a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)


def format_bytes(count: float) -> str:
    """`1234567` → `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    digits = 1 if count < 10 and unit != "bytes" else 0
    return f"{count:.{digits}f} {unit}"


def format_terms(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2e}" for name, value in terms.items())


def print_results(results: dict[str, Any]) -> None:
    """The demo's table on the terminal."""
    from rich.table import Table

    from convfusion.demo import HEADS, list_results

    table = Table(title="Distance to the teacher, held-out names")
    for number, head in enumerate(HEADS):
        words = head.replace(" ", "\n")  # so that it all fits into 80 columns
        table.add_column(words, justify="right" if number else "left", no_wrap=True)
    for row in list_results(results):
        table.add_row(*row)
    console().print(table)


def hide_loading_bars() -> None:
    """Keep the bars that flash by while files load off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Keep advice for programmers off the terminal, and reports of use from being sent."""
    keep_quiet()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else: torchvision is not there
    warnings.filterwarnings("ignore", category=FutureWarning)
