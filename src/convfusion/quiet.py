"""Libraries that call home unless they are told not to, before any of them is imported."""

from __future__ import annotations

import os

# By the library that reads it. diffusers imports onnxruntime where it is installed, and that sends
# events to its makers from its own code, which no hook of Python sees.
SWITCHES = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def keep_quiet() -> None:
    """Switch off what gradio, huggingface_hub and onnxruntime report of their use.

    It holds for libraries that this process has not imported yet.
    """
    os.environ.update(SWITCHES)
