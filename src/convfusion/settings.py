"""Values for the fields of settings, checked against what the fields declare."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from convfusion.errors import ConvFusionError


def check_fields(config: Any) -> None:
    """Check every field of a settings dataclass; for its `__post_init__`."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        check_value(each.name, getattr(config, each.name), hints[each.name])


def check_names(kind: Any, values: Mapping[str, Any], where: str) -> None:
    """Raise a ConvFusionError for a value that no field of a settings dataclass is called as."""
    known = [each.name for each in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise ConvFusionError(
            f"{where} has no setting {', '.join(map(repr, unknown))}: it has {', '.join(known)}"
        )


def check_value(name: str, value: Any, declared: Any) -> None:
    """Raise a ConvFusionError unless a value is of its declared kind.

    Kinds are `int`, `float` (finite; integers will do), `bool`, `str`, a `Literal` of words, and a
    tuple of numbers, and a dataclass. What else is declared is not checked here.
    """
    if get_origin(declared) is Literal:
        if value not in get_args(declared):
            words = ", ".join(get_args(declared))
            raise ConvFusionError(f"{name} must be one of {words}, not {value!r}")
    elif get_origin(declared) is tuple:
        count = len(get_args(declared))
        if not (isinstance(value, tuple) and len(value) == count):
            raise ConvFusionError(f"{name} must be {count} numbers, not {value!r}")
        for part in value:
            check_value(name, part, float)
    elif declared is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ConvFusionError(f"{name} must be a finite number, not {value!r}")
    elif isinstance(declared, type) and is_dataclass(declared) and not isinstance(value, declared):
        raise ConvFusionError(f"{name} must be a {declared.__name__}, not {value!r}")
    elif declared in (int, bool, str) and type(value) is not declared:
        raise ConvFusionError(f"{name} must be {declared.__name__}, not {value!r}")
