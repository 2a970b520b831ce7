"""Command-line options from the fields of a settings dataclass, so that none is forgotten."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_origin, get_type_hints

import typer


def with_fields(settings: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option for every field of a dataclass to a command.

    The command takes them as `training`, a dict of the fields that were named on the command line;
    fields of a dataclass within are options `--outer.inner`, and a dict within.

    Args:
        settings: the dataclass, whose docstring describes its `Attributes`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        # Not `get_type_hints`: before Python 3.11 it hides an `Annotated` whose default is None.
        signature = inspect.signature(command, eval_str=True)
        own = [
            parameter for parameter in signature.parameters.values() if parameter.name != "training"
        ]

        def called(**values: Any) -> Any:
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            return command(**mine, training=nest_options(values))

        called.__doc__, called.__name__ = command.__doc__, command.__name__
        parameters = [*own, *list_options(settings)]
        called.__dict__["__signature__"] = inspect.Signature(parameters)  # which typer reads
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate


def list_options(settings: type, prefix: str = "") -> list[inspect.Parameter]:
    """An optional keyword parameter, as typer reads it, for every field."""
    hints, texts = get_type_hints(settings), read_help_texts(settings)
    parameters = []
    for each in fields(settings):
        kind, name = hints[each.name], prefix + each.name
        if isinstance(kind, type) and is_dataclass(kind):
            parameters += list_options(kind, f"{name}.")
            continue
        default = each.default if each.default is not MISSING else None
        option = typer.Option(
            *name_flags(name, kind),
            help=texts[each.name],
            show_default=format_default(default),
            rich_help_panel="Training",
        )
        annotation: Any = Annotated[choose_type(kind) | None, option]
        parameters.append(
            inspect.Parameter(
                name.replace(".", "__"),
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=annotation,
            )
        )
    return parameters


def name_flags(name: str, kind: Any) -> list[str]:
    flag = name.replace("_", "-")
    return [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]


def choose_type(kind: Any) -> Any:
    """What typer should read for a field: words of a choice are checked by the settings."""
    return kind if get_origin(kind) is tuple or kind in (int, float, bool, str) else str


def format_default(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def read_help_texts(settings: type) -> dict[str, str]:
    """What the `Attributes` of a dataclass's docstring say of each field, as sentences."""
    _, _, text = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", text, re.MULTILINE)
    joined = {name: " ".join(words.split()) for name, words in entries}
    return {name: words[0].upper() + words[1:] for name, words in joined.items()}


def nest_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, those of a dataclass within under its name."""
    values_by_name: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        outer, _, inner = name.rpartition("__")
        place = values_by_name.setdefault(outer, {}) if outer else values_by_name
        place[inner] = value
    return values_by_name
