"""The command line. It is thin: each command calls what a script would call."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from convfusion import __version__
from convfusion.cli.analyze import ablate, analyze
from convfusion.cli.app import app as serve_app
from convfusion.cli.bench import bench
from convfusion.cli.cache import cache
from convfusion.cli.compare import compare
from convfusion.cli.console import INTERRUPTED, fail, quiet_libraries, steady_streams
from convfusion.cli.convert import convert
from convfusion.cli.curve import curve
from convfusion.cli.demo import demo
from convfusion.cli.distill import distill
from convfusion.cli.evaluate import evaluate
from convfusion.cli.export import export
from convfusion.cli.generate import generate
from convfusion.cli.info import info
from convfusion.cli.latency import latency
from convfusion.cli.plan import plan
from convfusion.cli.push import push
from convfusion.errors import ConvFusionError
from convfusion.imports import explained

app = typer.Typer(
    name="convfusion",
    help="Replace the self-attention of diffusion models by cheaper blocks, distil, and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo,
    info,
    plan,
    convert,
    cache,
    distill,
    generate,
    compare,
    evaluate,
    analyze,
    ablate,
    curve,
    export,
    push,
    serve_app,
)


def print_version(wanted: bool) -> None:
    """Print the version and leave, for `--version`."""
    if wanted:
        typer.echo(f"convfusion {__version__}")
        raise typer.Exit


@app.callback()
def describe_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Replace the self-attention of diffusion models by cheaper blocks, distil, and compare.

    `convfusion demo` shows all of it on a small model that comes with the package. A "site" is one
    self-attention layer of a model; `mini` names the small model.
    """


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
        if (message := explained(error)) is None:
            raise
        fail(message)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer says of wrong usage
            raise
        fail(f"{error.format_message()} Try --help.")
    if status == INTERRUPTED:  # typer's own answer to Ctrl-C, of which it says nothing
        fail("interrupted", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)
