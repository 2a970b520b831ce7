"""The page: three tabs, and a visit for everyone who opens it."""

from __future__ import annotations

import gradio as gr

from convfusion.app.compare_tab import Compare
from convfusion.app.evaluate_tab import Evaluate
from convfusion.app.look_tab import Look
from convfusion.app.studio import Studio
from convfusion.app.style import INTRODUCTION, WITHOUT_BLOCKS
from convfusion.app.visit import Visit
from convfusion.text import markdown_text


def build_page(studio: Studio, prompt: str = "") -> gr.Blocks:
    """The page of a studio, not served yet.

    Args:
        studio: what it draws with.
        prompt: that is in the field at first.
    """
    with gr.Blocks(
        title=f"ConvFusion: {studio.name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        words = INTRODUCTION if studio.has_blocks else WITHOUT_BLOCKS
        gr.Markdown(f"# ConvFusion: {markdown_text(studio.name)}\n\n{words}")
        visit = gr.State(Visit())
        visits: dict[str, Visit] = {}
        compare, look = Compare(studio, visits), Look(studio)
        with gr.Tab("Compare"):
            compare.lay_out(prompt)
        with gr.Tab("Look") as tab:
            look.lay_out()
        with gr.Tab("Evaluate"):
            evaluate = Evaluate()
            evaluate.lay_out()
        compare.connect(visit, look)
        look.connect(visit, tab)
        evaluate.connect(visit)

        def leave(request: gr.Request) -> None:
            visits.pop(str(request.session_hash), Visit()).leave()

        page.unload(leave)
    return page
