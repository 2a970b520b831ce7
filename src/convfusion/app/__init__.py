"""A web page on this machine: draw with teacher and student, and look at what attention does.

`studio` draws and `look` looks, without the page; `page` lays it out with gradio (extra `app`), and
`serve` brings it up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convfusion.imports import lazy

if TYPE_CHECKING:
    from convfusion.app.look import SiteView, look_from
    from convfusion.app.serve import serve
    from convfusion.app.studio import Drawn, Job, Studio, Wish

_HOMES = {
    "Drawn": "studio",
    "Job": "studio",
    "SiteView": "look",
    "Studio": "studio",
    "Wish": "studio",
    "look_from": "look",
    "serve": "serve",
}
__all__ = list(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
