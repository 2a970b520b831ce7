"""What the tabs of the page share."""

from __future__ import annotations

from typing import Any

Updates = dict[Any, Any]  # what an event changes, by component
Settings = dict[str, Any]
OWN: Settings = {"api_visibility": "private"}  # no program is meant to call the page
MODEL: Settings = {"concurrency_id": "model", "concurrency_limit": 1, **OWN}
QUICK: Settings = {"queue": False, "show_progress": "hidden", **OWN}
PICTURE: Settings = {
    "type": "filepath",
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
}
FAILURES = (RuntimeError, MemoryError)  # of a model at work, as where memory runs out
