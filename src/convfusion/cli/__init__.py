"""The command line: thin, each command calls what a script would call."""

from __future__ import annotations

import sys

import typer

from convfusion.cli.analyze import ablate, analyze
from convfusion.cli.bench import bench
from convfusion.cli.cache import cache
from convfusion.cli.console import INTERRUPTED, fail, quiet_libraries, steady_streams
from convfusion.cli.convert import convert
from convfusion.cli.curve import curve
from convfusion.cli.demo import demo
from convfusion.cli.distill import distill
from convfusion.cli.evaluate import evaluate
from convfusion.cli.export import export
from convfusion.cli.generate import generate
from convfusion.cli.latency import latency
from convfusion.cli.plan import plan
from convfusion.errors import ConvFusionError
from convfusion.imports import explained

app = typer.Typer(
    name="convfusion",
    help="Diffusion models without self-attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (demo, analyze, ablate, curve, plan, convert, cache, distill, evaluate, generate, export)
for command in COMMANDS:
    app.command()(command)
bench.command()(latency)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    steady_streams()
    quiet_libraries()
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ConvFusionError, OSError) as error:
        fail(str(error))
    except ImportError as error:
        if (told := explained(error)) is None:
            raise
        fail(told)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer says of wrong usage
            raise
        fail(f"{error.format_message()} Try --help.")
    if status == INTERRUPTED:  # typer's own answer to Ctrl-C, of which it says nothing
        fail("interrupted", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)
