"""The tab that shows the pictures of an evaluation, the worst first."""

from __future__ import annotations

import gradio as gr

from convfusion.app import show
from convfusion.app.evaluations import describe_sample, open_gallery
from convfusion.app.parts import OWN, PICTURE, Updates
from convfusion.app.style import HOW_TO_EVALUATE, say
from convfusion.app.visit import Visit
from convfusion.errors import ConvFusionError
from convfusion.text import markdown_text


class Evaluate:
    """The tab that shows the pictures of an evaluation, the worst first."""

    def lay_out(self) -> None:
        with gr.Row(equal_height=False):
            self.folder = gr.Textbox(
                "convfusion-evaluation",
                label="Folder of an evaluation on this machine",
                scale=4,
                min_width=200,
                elem_id="folder",
            )
            self.open = gr.Button("Open", variant="primary", min_width=100, elem_id="open")
        self.status = gr.HTML(say(HOW_TO_EVALUATE), elem_id="evaluate-status", padding=False)
        self.page = gr.Slider(1, 2, 1, step=1, label="Page", visible=False)
        self.gallery = gr.Gallery(
            show_label=False,
            columns=4,
            height=440,
            object_fit="contain",
            format="png",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id="gallery",
        )
        self.words = gr.Markdown(elem_id="sample")
        with gr.Row():
            names = ("teacher", "student", "teacher, another noise")
            self.sides = [
                gr.Image(label=name, visible=False, min_width=240, **PICTURE) for name in names
            ]

    def connect(self, visit: gr.State) -> None:
        shown = [self.status, self.page, self.gallery, self.words, *self.sides]
        for trigger in (self.open.click, self.folder.submit):
            trigger(self.show_folder, [visit, self.folder], shown, **OWN)
        turned = ([visit, self.page], [self.gallery, self.status])
        self.page.release(self.show_page, *turned, **OWN)
        detail = [self.status, self.words, *self.sides]
        self.gallery.select(self.show_sample, [visit], detail, **OWN)

    def show_folder(self, visit: Visit, folder: str) -> Updates:
        """Open an evaluation at its worst pictures."""
        away = {self.words: ""} | {each: gr.update(visible=False) for each in self.sides}
        try:
            visit.gallery = gallery = open_gallery(folder)
        except ConvFusionError as error:
            visit.gallery = None
            hidden = gr.update(value=None, visible=False)
            return away | {self.status: say(str(error), wrong=True), self.gallery: hidden}
        pages = gr.update(maximum=max(2, gallery.pages), value=1, visible=gallery.pages > 1)
        return away | {self.page: pages} | self.show_page(visit, 1)

    def show_page(self, visit: Visit, page: float) -> Updates:
        """Show a page of the gallery that is open."""
        gallery = visit.gallery
        if gallery is None:
            return {self.status: say(HOW_TO_EVALUATE)}
        visit.page = int(page)
        try:
            pairs = [
                (visit.keep(pair), words)
                for pair, words in map(gallery.show_pair, gallery.on_page(visit.page))
            ]
        except ConvFusionError as error:
            return {self.status: say(str(error), wrong=True), self.gallery: None}
        count = len(gallery.samples)
        words = (
            f"{gallery.student}: {count} sample{'s' if count > 1 else ''}, the worst first. Each "
            "shows the teacher's picture and the student's; click one for its full size."
        )
        shown = gr.update(value=pairs, visible=True, selected_index=None)
        return {self.gallery: shown, self.status: say(words)}

    def show_sample(self, visit: Visit, event: gr.SelectData) -> Updates:
        """Show the pictures of a sample in full size."""
        gallery = visit.gallery
        if gallery is None:
            return {self.status: say(HOW_TO_EVALUATE)}
        sample = gallery.on_page(visit.page)[event.index]
        try:
            images = list(gallery.read_sides(sample).values())
        except ConvFusionError as error:
            return {self.status: say(str(error), wrong=True)}
        words = f"**{markdown_text(sample.prompt)}** · {describe_sample(sample)}"
        return {self.words: words} | {
            part: gr.update(value=visit.keep(show.enlarge(image)), visible=True)
            for part, image in zip(self.sides, images, strict=True)
        }
