"""What the command line shows on a terminal."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

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


def progress_bar() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(),
    )


def describe(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2e}" for name, value in terms.items())


def print_results(results: dict[str, Any]) -> None:
    """The demo's table on the terminal."""
    from rich.table import Table

    from convfusion.report import format_psnr

    table = Table(title="Distance to the teacher, held-out names")
    for column in ("", "ε-error", "of removed", "picture PSNR"):
        table.add_column(column, justify="left" if not column else "right")
    worst = results["removed"]["epsilon_error"]
    for name in ("removed", "distilled", "shipped"):
        row = results[name]
        ratio = f"1/{worst / row['epsilon_error']:.1f}"
        psnr = format_psnr(row["image_psnr"], row["image_psnr_error"])
        table.add_row(name, f"{row['epsilon_error']:.2e}", ratio, psnr)
    console().print(table)


def hide_loading_bars() -> None:
    """Keep the bars that flash by while files load off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Keep the advice that libraries give to programmers off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
