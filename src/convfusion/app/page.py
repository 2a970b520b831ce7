"""The page: three tabs over what `studio`, `look` and `evaluations` do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from convfusion.app import evaluations, show
from convfusion.app.look import look_from, watch_call
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
from convfusion.app.style import (
    HOW_TO_EVALUATE,
    HOW_TO_LOOK,
    INTRODUCTION,
    WORDS_OF_CARDS,
    explain,
    say,
    show_progress,
)
from convfusion.app.visit import Visit
from convfusion.errors import ConvFusionError
from convfusion.text import markdown_text

Updates = dict[Any, Any]
Settings = dict[str, Any]
OWN: Settings = {"api_visibility": "private"}  # no programs are meant to call the page
MODEL: Settings = {"concurrency_id": "model", "concurrency_limit": 1, **OWN}
QUICK: Settings = {"queue": False, "show_progress": "hidden", **OWN}
PLAIN: Settings = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}


def build_page(studio: Studio, prompt: str = "") -> gr.Blocks:
    """The page of a studio, not served yet.

    Args:
        studio: what it draws with.
        prompt: that is in the field at first.
    """
    with gr.Blocks(
        title=f"ConvFusion: {studio.name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(f"# ConvFusion: {markdown_text(studio.name)}\n\n{INTRODUCTION}")
        visit = gr.State(Visit())
        visits: dict[str, Visit] = {}
        compare, look = Compare(studio, visits), Look(studio)
        with gr.Tab("Compare", render_children=True):
            compare.lay_out(prompt)
        with gr.Tab("Look", render_children=True):
            look.lay_out()
        with gr.Tab("Evaluate", render_children=True):
            evaluate = Evaluate()
            evaluate.lay_out()
        compare.connect(visit, look)
        look.connect(visit)
        evaluate.connect(visit)

        def leave(request: gr.Request) -> None:
            visits.pop(str(request.session_hash), Visit()).leave()

        page.unload(leave)
    return page


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
            self.width = gr.Number(width, label="Width", precision=0, min_width=80)
            self.height = gr.Number(height, label="Height", precision=0, min_width=80)
            self.guidance = gr.Number(studio.guidance, label="Guidance", min_width=80)
        if studio.fixed_size:
            self.width.visible = self.height.visible = False
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
        self.status = gr.HTML(say("Write a prompt and press Draw."), elem_id="status")

    def lay_out_pictures(self) -> None:
        self.pictures, self.captions = {}, {}
        with gr.Row(elem_classes="cf-pictures"):
            for side in self.studio.sides:
                with gr.Column(min_width=90):
                    name = self.names[side]
                    self.pictures[side] = gr.Image(
                        label=name, type="pil", elem_id=f"picture-{side}", **PLAIN
                    )
                    self.captions[side] = gr.Markdown(f"**{name}**", elem_id=f"caption-{side}")
        sites = self.studio.converted
        self.sites = gr.CheckboxGroup(
            [(label, path) for path, label in sites.items()],
            label="Give single sites their attention back",
            info="A site is one self-attention layer. The student is drawn again at once.",
            elem_id="sites",
        )
        with gr.Row():
            choices = [(self.names[side], side) for side in self.studio.sides]
            self.left = gr.Dropdown(choices, value=TEACHER, label="Left of the slider")
            self.right = gr.Dropdown(choices, value=STUDENT, label="Right of the slider")
        self.slider = gr.ImageSlider(
            label="Two of them, one over the other", type="pil", elem_id="slider", **PLAIN
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
        """Begin a job for this visitor, before its turn comes."""
        visit.job = Job()
        self.visits[str(request.session_hash)] = visit
        resting = {each: gr.update(interactive=False) for each in self.controls}
        begun = {self.status: say("Waiting for its turn …"), self.stop: gr.update(interactive=True)}
        return begun | resting

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

        def draw() -> Iterator[Updates]:
            wish = parse_wish(prompt, seed, steps, guidance, (height, width))
            self.studio.check(wish)
            visit.begin(wish)
            yield self.clear() | self.look.clear()
            for side in self.studio.sides:
                yield from self.draw_side(visit, side, given_back, left, right)
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
            yield from self.draw_side(visit, STUDENT, given_back, left, right)

        yield from self.finish(draw())

    def draw_side(
        self, visit: Visit, side: str, given_back: list[str], left: str, right: str
    ) -> Iterator[Updates]:
        """Draw one picture, and show it as soon as it is there."""
        assert visit.wish is not None
        name = self.names[side]

        chosen = given_back if side == STUDENT else ()
        for event in self.studio.follow(side, visit.wish, visit.job, chosen):
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
            self.pictures[side]: show.enlarge(drawn.image),
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
        except (ConvFusionError, RuntimeError, MemoryError) as error:
            words = say(explain(error), wrong=True)
        awake = {each: gr.update(interactive=True) for each in self.controls}
        yield {self.status: words, self.stop: gr.update(interactive=False)} | awake

    def clear(self) -> Updates:
        """Take the pictures of an earlier wish away."""
        captions = {self.captions[side]: f"**{self.names[side]}**" for side in self.studio.sides}
        return dict.fromkeys(self.pictures.values()) | captions | {self.slider: None}

    def slide(self, visit: Visit, left: str, right: str) -> Updates:
        """Two of the pictures over each other, once both are there."""
        pair = [visit.drawn.get(side) for side in (left, right)]
        images = tuple(show.enlarge(drawn.image) for drawn in pair if drawn is not None)
        return {self.slider: images if len(images) == 2 else None}


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
                    type="pil",
                    elem_id="look-picture",
                    **PLAIN | {"buttons": []},
                )
                self.step = gr.Slider(
                    1, 2, 1, step=1, label="Step of the drawing", interactive=False, elem_id="step"
                )
                self.status = gr.HTML(say(HOW_TO_LOOK), elem_id="look-status")
            with gr.Column(scale=5, min_width=300):
                self.views = gr.HTML("", elem_id="views")

    def connect(self, visit: gr.State) -> None:
        outputs = [self.picture, self.status, self.views]
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
            self.picture: show.enlarge(drawn.image),
            self.step: gr.update(maximum=max(2, steps), value=(steps + 1) // 2, interactive=True),
            self.status: say("Click a point of the picture."),
        }

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
        job = visit.job = Job()
        number = min(int(step), len(drawn.calls))
        try:
            if visit.seen is None or visit.step != number:
                visit.seen = watch_call(self.studio, drawn.calls[number - 1], job)
                visit.step = number
            views = look_from(self.studio, visit.seen, visit.point)
        except Stopped:
            return {self.status: say("Stopped.")}
        except (ConvFusionError, RuntimeError, MemoryError) as error:
            return {self.status: say(explain(error), wrong=True)}
        at = f"Step {number} of {len(drawn.calls)}, timestep {drawn.calls[number - 1].timestep}."
        return {
            self.picture: show.mark_point(drawn.image, visit.point),
            self.status: say(at),
            self.views: show.show_views(drawn.image, views, self.studio.labels),
        }


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
        self.status = gr.HTML(say(HOW_TO_EVALUATE), elem_id="evaluate-status")
        self.page = gr.Slider(1, 2, 1, step=1, label="Page", visible=False)
        self.gallery = gr.Gallery(
            label="Teacher and student, the worst first: click one for its full size",
            columns=4,
            height="auto",
            object_fit="contain",
            format="png",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="gallery",
        )
        self.words = gr.Markdown(elem_id="sample")
        with gr.Row(elem_classes="cf-pictures"):
            names = ("teacher", "student", "teacher, another noise")
            self.sides = [
                gr.Image(label=name, type="pil", visible=False, min_width=90, **PLAIN)
                for name in names
            ]

    def connect(self, visit: gr.State) -> None:
        shown = [self.status, self.page, self.gallery, self.words, *self.sides]
        for trigger in (self.open.click, self.folder.submit):
            trigger(self.show_folder, [visit, self.folder], shown, **OWN)
        turned = ([visit, self.page], [self.gallery, self.status])
        self.page.release(self.show_page, *turned, **OWN)
        detail = [self.status, self.words, *self.sides]
        self.gallery.select(self.show_sample, [visit, self.page], detail, **OWN)

    def show_folder(self, visit: Visit, folder: str) -> Updates:
        """Open an evaluation at its worst pictures."""
        away = {self.words: ""} | {each: gr.update(visible=False) for each in self.sides}
        try:
            visit.gallery = gallery = evaluations.open_gallery(folder)
        except ConvFusionError as error:
            visit.gallery = None
            return away | {self.status: say(str(error), wrong=True), self.gallery: None}
        pages = gr.update(maximum=max(2, gallery.pages), value=1, visible=gallery.pages > 1)
        return away | {self.page: pages} | self.show_page(visit, 1)

    def show_page(self, visit: Visit, page: float) -> Updates:
        """Show a page of the gallery that is open."""
        gallery = visit.gallery
        if gallery is None:
            return {self.status: say(HOW_TO_EVALUATE)}
        try:
            pairs = [evaluations.show_pair(gallery, s) for s in gallery.on_page(int(page))]
        except ConvFusionError as error:
            return {self.status: say(str(error), wrong=True), self.gallery: None}
        count = len(gallery.samples)
        words = f"{gallery.student}: {count} sample{'s' if count > 1 else ''}, by PSNR."
        return {self.gallery: pairs, self.status: say(words)}

    def show_sample(self, visit: Visit, page: float, event: gr.SelectData) -> Updates:
        """Show the pictures of a sample in full size."""
        gallery = visit.gallery
        if gallery is None:
            return {self.status: say(HOW_TO_EVALUATE)}
        sample = gallery.on_page(int(page))[event.index]
        try:
            images = list(evaluations.read_sides(gallery, sample).values())
        except ConvFusionError as error:
            return {self.status: say(str(error), wrong=True)}
        words = f"**{markdown_text(sample.prompt)}** · {evaluations.describe_sample(sample)}"
        return {self.words: words} | {
            part: gr.update(value=show.enlarge(image), visible=True)
            for part, image in zip(self.sides, images, strict=True)
        }
