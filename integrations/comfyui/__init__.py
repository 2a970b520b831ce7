"""ConvFusion's nodes for ComfyUI: link or copy this folder into `custom_nodes`.

What works without ComfyUI is in the library `convfusion`; here is only what speaks to ComfyUI. All
of it is imported when a node runs, so that ComfyUI starts as fast as before.
"""

from importlib.util import find_spec

if find_spec("convfusion") is None:
    raise ImportError(
        "ConvFusion's nodes need the library convfusion in the Python that runs ComfyUI: run "
        "`python -m pip install .` with that Python in a clone of ConvFusion, then start ComfyUI "
        "again"
    )

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
