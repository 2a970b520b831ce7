"""What one visitor of the page has drawn; no other visitor sees any of it."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from PIL import Image

from convfusion.app.evaluations import Gallery
from convfusion.app.look import Seen
from convfusion.app.studio import Drawn, Job, Wish
from convfusion.files import write_picture


class Visit:
    """One open page. It is no dataclass, since gradio would copy the fields of one.

    Attributes:
        job: what is being drawn or looked at for it, or was last.
        wish: what `drawn` shows.
        drawn: the last picture of each side.
        point: that is looked from, (down, across) as shares of the picture.
        step: of the drawing that is looked at, from 1.
        seen: the tokens of every site at this step; None until they are needed.
        gallery: the evaluation that is open.
        page: of the gallery that is shown, from 1.
    """

    def __init__(self) -> None:
        self.job = Job()
        self.wish: Wish | None = None
        self.drawn: dict[str, Drawn] = {}
        self.point: tuple[float, float] | None = None
        self.step = 0
        self.seen: list[Seen] | None = None
        self.gallery: Gallery | None = None
        self.page = 1
        self._folder: tempfile.TemporaryDirectory | None = None

    def begin(self, wish: Wish) -> None:
        """Forget what was drawn for an earlier wish."""
        self.wish, self.drawn, self.point, self.seen = wish, {}, None, None

    def leave(self) -> None:
        """End what is being drawn, and free what was: the page was closed."""
        self.job.stopped = True
        self.wish, self.drawn, self.seen, self.gallery = None, {}, None, None
        self._folder = None

    def keep(self, image: Image.Image) -> str:
        """Write a picture that the page is to show, and tell where it lies.

        Gradio itself would write an equal picture anew while a browser reads the one before.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="convfusion-visit-")
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:24]
        path = Path(self._folder.name) / f"{digest}.png"
        if not path.is_file():
            write_picture(path, image)
        return str(path)
