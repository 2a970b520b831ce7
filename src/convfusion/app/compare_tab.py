"""The tab that draws: teacher, student and the model without self-attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from convfusion.app import show
from convfusion.app.look_tab import Look
from convfusion.app.parts import FAILURES, MODEL, PICTURE, QUICK, Settings, Updates
from convfusion.app.studio import (
    REMOVED,
    STUDENT,
    TEACHER,
    Drawn,
    Job,
    Stopped,
    Studio,
    measure_psnr,
    parse_wish,
)
from convfusion.app.style import explain, say, show_progress
from convfusion.app.visit import Visit
from convfusion.errors import ConvFusionError


class Compare:
    """The tab that draws: teacher, student and the model without self-attention."""

    def __init__(self, studio: Studio, visits: dict[str, Visit]) -> None:
        self.studio, self.visits = studio, visits
        self.names = {TEACHER: "teacher", STUDENT: "student", REMOVED: "removed"}
        if not studio.has_blocks:
            self.names[STUDENT] = "removed"

    def lay_out(self, prompt: str) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.lay_out_fields(prompt)
            with gr.Column(scale=5, min_width=300):
                self.lay_out_pictures()

    def lay_out_fields(self, prompt: str) -> None:
        studio = self.studio
        height, width = studio.size
        self.prompt = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=4, elem_id="prompt")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=100)
            self.steps = gr.Number(25, label="Steps", precision=0, min_width=100, elem_id="steps")
        with gr.Row():
            side: Settings = {"precision": 0, "min_width": 80, "visible": not studio.fixed_size}
            self.width = gr.Number(width, label="Width", elem_id="width", **side)
            self.height = gr.Number(height, label="Height", elem_id="height", **side)
            self.guidance = gr.Number(studio.guidance, label="Guidance", min_width=80)
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
        self.status = gr.HTML(
            say("Write a prompt and press Draw."), elem_id="status", padding=False
        )

    def lay_out_pictures(self) -> None:
        self.pictures, self.captions = {}, {}
        with gr.Row(elem_classes="cf-pictures"):
            for side in self.studio.sides:
                with gr.Column(min_width=90):
                    name = self.names[side]
                    self.pictures[side] = gr.Image(
                        label=name,
                        show_label=False,
                        elem_id=f"picture-{side}",
                        **PICTURE,
                    )
                    self.captions[side] = gr.Markdown(f"**{name}**", elem_id=f"caption-{side}")
        sites = self.studio.converted
        self.sites = gr.CheckboxGroup(
            [(label, path) for path, label in sites.items()],
            label="Give single sites their attention back",
            info=f"A site is one self-attention layer. The {self.names[STUDENT]} picture "
            "is drawn again at once.",
            elem_id="sites",
        )
        with gr.Row():
            choices = [(self.names[side], side) for side in self.studio.sides]
            self.left = gr.Dropdown(choices, value=TEACHER, label="Left of the slider")
            self.right = gr.Dropdown(choices, value=STUDENT, label="Right of the slider")
        self.slider = gr.ImageSlider(
            label="Two of them, one over the other", elem_id="slider", **PICTURE
        )

    @property
    def controls(self) -> list[Any]:
        """What rests while something is drawn."""
        return [self.draw, self.sites]

    @property
    def outputs(self) -> list[Any]:
        """All that a drawing may change in this tab."""
        pictures = [*self.pictures.values(), *self.captions.values(), self.slider]
        return [self.status, self.stop, *self.controls, *pictures]

    def connect(self, visit: gr.State, look: Look) -> None:
        wishes = [self.prompt, self.seed, self.steps, self.guidance, self.height, self.width]
        chosen = [self.sites, self.left, self.right]
        begun = {"inputs": [visit], "outputs": [self.status, self.stop, *self.controls], **QUICK}
        outputs = [*self.outputs, look.picture, look.step, look.status, look.views]
        drawing = {"outputs": outputs, "show_progress": "hidden", **MODEL}
        self.look = look
        for trigger in (self.draw.click, self.prompt.submit):
            trigger(self.begin, **begun).then(self.draw_all, [visit, *wishes, *chosen], **drawing)
        self.sites.input(self.begin, **begun).then(self.redraw, [visit, *chosen], **drawing)
        self.stop.click(self.end, [visit], [self.status, self.stop], **QUICK)
        for side in (self.left, self.right):
            side.input(self.slide, [visit, self.left, self.right], [self.slider], **QUICK)

    def begin(self, visit: Visit, request: gr.Request) -> Updates:
        """Begin a job for this visitor, before its turn comes, in place of an earlier one."""
        visit.job.stopped = True
        visit.job = Job()
        self.visits[str(request.session_hash)] = visit
        return {self.status: say("Waiting for the model …")} | self.rest(True)

    def rest(self, resting: bool) -> Updates:
        """Let the controls rest while something is drawn, and Stop while nothing is."""
        controls = {each: gr.update(interactive=not resting) for each in self.controls}
        return controls | {self.stop: gr.update(interactive=resting)}

    def end(self, visit: Visit) -> Updates:
        """Stop the job of this visitor; it ends after the step that it is at."""
        visit.job.stopped = True
        return {self.status: say("Stopping …"), self.stop: gr.update(interactive=False)}

    def draw_all(
        self,
        visit: Visit,
        prompt: str,
        seed: float | None,
        steps: float | None,
        guidance: float | None,
        height: float | None,
        width: float | None,
        given_back: list[str],
        left: str,
        right: str,
    ) -> Iterator[Updates]:
        """Draw every side, one after the other."""
        job = visit.job

        def draw() -> Iterator[Updates]:
            wish = parse_wish(prompt, seed, steps, guidance, (height, width))
            self.studio.check(wish)
            visit.begin(wish)
            yield self.rest(True) | self.clear() | self.look.clear()
            for side in self.studio.sides:
                yield from self.draw_side(visit, job, side, given_back, left, right)
                if side == TEACHER:
                    yield self.look.offer(visit)

        yield from self.finish(draw())

    def redraw(
        self,
        visit: Visit,
        given_back: list[str],
        left: str,
        right: str,
    ) -> Iterator[Updates]:
        """Draw the student again, with the attention of other sites."""

        def draw() -> Iterator[Updates]:
            if TEACHER not in visit.drawn:
                raise ConvFusionError("nothing is drawn yet: press Draw")
            yield from self.draw_side(visit, visit.job, STUDENT, given_back, left, right)

        yield from self.finish(draw())

    def draw_side(
        self, visit: Visit, job: Job, side: str, given_back: list[str], left: str, right: str
    ) -> Iterator[Updates]:
        """Draw one picture, and show it as soon as it is there."""
        assert visit.wish is not None
        name = self.names[side]
        chosen = given_back if side == STUDENT else ()
        for event in self.studio.follow(side, visit.wish, job, chosen):
            if isinstance(event, Drawn):
                drawn = event
            else:
                yield {self.status: show_progress(f"Drawing: {name}", *event)}
        visit.drawn[side] = drawn
        psnr = None if side == TEACHER else measure_psnr(drawn, visit.drawn[TEACHER])
        if side == STUDENT and given_back:
            count = len(given_back)
            name += f", attention at {count} site{'s' if count > 1 else ''}"
        yield {
            self.pictures[side]: visit.keep(show.enlarge(drawn.image)),
            self.captions[side]: show.describe_drawn(name, drawn.seconds, psnr),
            **self.slide(visit, left, right),
        }

    def finish(self, work: Iterator[Updates]) -> Iterator[Updates]:
        """Pass on what a job shows, and say how it ended."""
        try:
            yield from work
            words = say("Drawn. The slider below shows two of the pictures over each other.")
        except Stopped:
            words = say("Stopped.")
        except (ConvFusionError, *FAILURES) as error:
            words = say(explain(error), wrong=True)
        yield {self.status: words} | self.rest(False)

    def clear(self) -> Updates:
        """Take the pictures of an earlier wish away."""
        captions = {self.captions[side]: f"**{self.names[side]}**" for side in self.studio.sides}
        return dict.fromkeys(self.pictures.values()) | captions | {self.slider: None}

    def slide(self, visit: Visit, left: str, right: str) -> Updates:
        """Two of the pictures over each other, once both are there."""
        pair = [visit.drawn.get(side) for side in (left, right)]
        images = tuple(visit.keep(show.enlarge(each.image)) for each in pair if each is not None)
        return {self.slider: images if len(images) == 2 else None}
