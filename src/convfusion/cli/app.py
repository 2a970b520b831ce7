"""`convfusion app`."""

from __future__ import annotations

from typing import Annotated

import typer

from convfusion.cli.models import (
    check_loading,
    choose_guidance,
    equip,
    is_embedded,
    name_pipeline,
    open_pipeline,
    warn_if_untrained,
)
from convfusion.cli.options import Blocks, Device, Model, Precision, Revision

Port = Annotated[int, typer.Option(help="Port of 127.0.0.1 that the page is served on.")]
PROMPT = "red apple, noto"  # that the embedded model knows how to draw


def app(
    model: Model = "mini",
    blocks: Blocks = None,
    port: Port = 7860,
    revision: Revision = None,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Serve a web page on this machine: compare teacher and student, and look at the attention.

    It draws a prompt with the attention, with the blocks and with neither, gives single layers
    their attention back, shows where each layer looks from a point, and opens evaluations. No
    other machine can reach the page, and the page reaches none. Ctrl-C ends it.
    """
    from convfusion.app.serve import check_port, serve
    from convfusion.app.studio import Studio
    from convfusion.imports import check_installed

    check_installed("gradio")
    check_port(port)
    check_loading(precision, device)
    pipe = open_pipeline(model, precision, device, revision)
    if blocks is not None:
        equip(pipe, blocks, None)
    warn_if_untrained(pipe)
    guidance = choose_guidance(model, pipe)
    studio = Studio(pipe, name_pipeline(model, blocks), guidance)
    prompt = PROMPT if is_embedded(model) else ""

    def tell(address: str) -> None:
        typer.echo(f"The page is at {address} until you press Ctrl-C.")

    serve(studio, port=port, prompt=prompt, on_ready=tell)
