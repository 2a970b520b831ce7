"""The tab that shows what attention and block see from a point of the teacher's picture."""

from __future__ import annotations

import gradio as gr

from convfusion.app import show
from convfusion.app.look import look_from, watch_call
from convfusion.app.parts import FAILURES, MODEL, PICTURE, QUICK, Updates
from convfusion.app.studio import TEACHER, Studio
from convfusion.app.style import HOW_TO_LOOK, WORDS_OF_CARDS, explain, say
from convfusion.app.visit import Visit
from convfusion.errors import ConvFusionError


class Look:
    """The tab that shows what attention and block see from a point of the teacher's picture."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def lay_out(self) -> None:
        gr.Markdown(WORDS_OF_CARDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.picture = gr.Image(
                    label="The teacher's picture: click a point of it",
                    elem_id="look-picture",
                    **PICTURE | {"buttons": []},
                )
                self.step = gr.Slider(
                    1, 2, 1, step=1, label="Step of the drawing", interactive=False, elem_id="step"
                )
                self.status = gr.HTML(say(HOW_TO_LOOK), elem_id="look-status", padding=False)
            with gr.Column(scale=5, min_width=300):
                self.views = gr.HTML("", elem_id="views", padding=False)

    def connect(self, visit: gr.State, tab: gr.Tab) -> None:
        outputs = [self.picture, self.status, self.views]
        # A picture that comes while a tab was never open is lost.
        tab.select(self.show_picture, [visit], [self.picture], **QUICK)
        looking = {"outputs": outputs, "show_progress_on": [self.status], **MODEL}
        self.picture.select(self.click, [visit, self.step], **looking)
        self.step.release(self.look, [visit, self.step], **looking)

    def clear(self) -> Updates:
        """Forget an earlier drawing."""
        step = gr.update(interactive=False)
        return {self.picture: None, self.step: step, self.status: say(HOW_TO_LOOK), self.views: ""}

    def offer(self, visit: Visit) -> Updates:
        """Show a new picture of the teacher's, to be clicked."""
        drawn = visit.drawn[TEACHER]
        steps = len(drawn.calls)
        return {
            self.picture: visit.keep(show.enlarge(drawn.image)),
            self.step: gr.update(maximum=max(2, steps), value=(steps + 1) // 2, interactive=True),
            self.status: say("Click a point of the picture."),
        }

    def show_picture(self, visit: Visit) -> Updates:
        """The picture of the last drawing, with the point that is looked from."""
        if TEACHER not in visit.drawn:
            return {self.picture: None}
        image = visit.drawn[TEACHER].image
        marked = show.enlarge(image) if visit.point is None else show.mark_point(image, visit.point)
        return {self.picture: visit.keep(marked)}

    def click(self, visit: Visit, step: float, event: gr.SelectData) -> Updates:
        """Look from the point that was clicked."""
        if TEACHER in visit.drawn:
            width, height = show.enlarge(visit.drawn[TEACHER].image).size
            across, down = event.index
            visit.point = (down / height, across / width)
        return self.look(visit, step)

    def look(self, visit: Visit, step: float) -> Updates:
        """Look from the last point at a step of the drawing."""
        drawn = visit.drawn.get(TEACHER)
        if drawn is None:
            return {self.status: say(HOW_TO_LOOK)}
        if visit.point is None:
            return {self.status: say("Click a point of the picture.")}
        number = min(int(step), len(drawn.calls))
        try:
            if visit.seen is None or visit.step != number:
                visit.seen = watch_call(self.studio, drawn.calls[number - 1])
                visit.step = number
            views = look_from(self.studio, visit.seen, visit.point)
        except (ConvFusionError, *FAILURES) as error:
            return {self.status: say(explain(error), wrong=True)}
        at = f"Step {number} of {len(drawn.calls)}, timestep {drawn.calls[number - 1].timestep}."
        return {
            **self.show_picture(visit),
            self.status: say(at),
            self.views: show.show_views(drawn.image, views, self.studio.labels),
        }
