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

    The command takes them as `given`, a dict of the fields that were named on the command line;
    fields of a dataclass within are options `--outer.inner`, and a dict within.

    Args:
        settings: the dataclass, whose docstring describes its `Attributes`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        # Not `get_type_hints`: before Python 3.11 it hides an `Annotated` whose default is None.
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.name != "given"]

        def called(**values: Any) -> Any:
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            return command(**mine, given=nested(values))

        called.__doc__, called.__name__ = command.__doc__, command.__name__
        parameters = [*own, *options(settings)]
        called.__dict__["__signature__"] = inspect.Signature(parameters)  # which typer reads
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate


def options(settings: type, prefix: str = "") -> list[inspect.Parameter]:
    """An optional keyword parameter, as typer reads it, for every field."""
    hints, texts = get_type_hints(settings), help_texts(settings)
    found = []
    for each in fields(settings):
        kind, name = hints[each.name], prefix + each.name
        if isinstance(kind, type) and is_dataclass(kind):
            found += options(kind, f"{name}.")
            continue
        default = each.default if each.default is not MISSING else None
        option = typer.Option(
            *flags(name, kind),
            help=texts[each.name],
            show_default=shown(default),
            rich_help_panel="Training",
        )
        annotation: Any = Annotated[plain(kind) | None, option]
        found.append(
            inspect.Parameter(
                name.replace(".", "__"),
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=annotation,
            )
        )
    return found


def flags(name: str, kind: Any) -> list[str]:
    flag = name.replace("_", "-")
    return [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]


def plain(kind: Any) -> Any:
    """What typer should read for a field: words of a choice are checked by the settings."""
    return kind if get_origin(kind) is tuple or kind in (int, float, bool, str) else str


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def help_texts(settings: type) -> dict[str, str]:
    """What the `Attributes` of a dataclass's docstring say of each field, as sentences."""
    _, _, text = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", text, re.MULTILINE)
    joined = {name: " ".join(words.split()) for name, words in entries}
    return {name: words[0].upper() + words[1:] for name, words in joined.items()}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, those of a dataclass within under its name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        outer, _, inner = name.rpartition("__")
        place = found.setdefault(outer, {}) if outer else found
        place[inner] = value
    return found
