"""What the page shows, as pictures and HTML, made from what was drawn and seen."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from convfusion.app.look import SHARE, Reach, SiteView
from convfusion.report import BLUE, INK, ORANGE, embed_picture

SHOWN_SIDE = 512  # small pictures are enlarged to about this, each pixel a square
MAP_SIDE = 160  # of a map in a card
CURVE = (240, 110)  # width and height of a curve in a card
OPAQUE = 0.85  # of the strongest colour: the picture shines through


def enlarge(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """A small picture with each pixel as a square; others as they are."""
    scale = max(1, side // max(image.size))
    size = (image.width * scale, image.height * scale)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def mark_point(image: Image.Image, point: tuple[float, float]) -> Image.Image:
    """An enlarged picture with a cross at a point, (down, across) as shares of its sides."""
    marked = enlarge(image)
    draw = ImageDraw.Draw(marked)
    y, x = point[0] * marked.height, point[1] * marked.width
    arm = max(8, min(marked.size) // 32)
    for width, colour in ((5, "white"), (2, ORANGE)):
        draw.line((x - arm, y, x + arm, y), fill=colour, width=width)
        draw.line((x, y - arm, x, y + arm), fill=colour, width=width)
    return marked


def overlay(image: Image.Image, reach: Reach, query: tuple[int, int], colour: str) -> Image.Image:
    """A map [H][W] over a faded picture: the stronger, the more of the colour.

    The square root of the weights is shown, relative to the largest, so that weak ones are seen
    beside a peak. The token that looks has a frame.
    """
    rows, columns = reach.weights.shape
    scale = MAP_SIDE / max(rows, columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    grey = ImageOps.grayscale(image).resize(size, Image.Resampling.BILINEAR)
    faded = Image.blend(grey.convert("RGB"), Image.new("RGB", size, "white"), 0.55)
    mask = Image.fromarray(_strength(reach.weights)).resize(size, Image.Resampling.NEAREST)
    faded.paste(Image.new("RGB", size, colour), mask=mask)
    top, left = query[0] * scale, query[1] * scale
    frame = (left, top, left + scale - 1, top + scale - 1)
    ImageDraw.Draw(faded).rectangle(tuple(map(round, frame)), outline=INK, width=2)
    return faded


def _strength(weights: Tensor) -> np.ndarray:
    """√(w / max w) as opacity of 8 bits, [H, W]."""
    values = weights.numpy()
    return (np.sqrt(values / max(values.max(), 1e-30)) * OPAQUE * 255).astype(np.uint8)


def describe_drawn(name: str, seconds: float, psnr: float | None) -> str:
    """The line below a picture, in Markdown: seconds, and how near to the teacher's it is."""
    if psnr is None:
        near = ""
    else:
        near = " · equal to the teacher" if math.isinf(psnr) else f" · PSNR {psnr:.1f} dB"
    return f"**{name}** · {seconds:.1f} s{near}"


def show_views(image: Image.Image, views: Sequence[SiteView], labels: dict[str, str]) -> str:
    """A card for every site: its maps over the picture, and its numbers.

    Args:
        image: the teacher's.
        views: of the sites.
        labels: of the sites, by path.
    """
    cards = "".join(_show_card(image, view, labels[view.path]) for view in views)
    return f'<div class="cf-cards">{cards}</div>'


def _show_card(image: Image.Image, view: SiteView, label: str) -> str:
    maps = [_show_map(image, view.attention, view.query, BLUE, "attention")]
    if view.block is not None:
        maps.append(_show_map(image, view.block, view.query, ORANGE, "block"))
    elif view.mixer:
        maps.append(f'<p class="cf-none">The block ({_name(view)}) looks at no token.</p>')
    title = f"{html.escape(label)} <small>{view.grid[0]}×{view.grid[1]} tokens</small>"
    return (
        f'<section class="cf-card" data-site="{html.escape(view.path)}">'
        f'<h3 title="{html.escape(view.path)}">{title}</h3>'
        f'<div class="cf-maps">{"".join(maps)}</div>{_show_curves(view)}{_show_numbers(view)}'
        "</section>"
    )


def _show_map(
    image: Image.Image, reach: Reach, query: tuple[int, int], colour: str, words: str
) -> str:
    picture = embed_picture(overlay(image, reach, query, colour))
    return (
        f'<figure><img alt="What the {words} sees" src="{picture}">'
        f'<figcaption class="cf-{words}">{words}</figcaption></figure>'
    )


def _show_numbers(view: SiteView) -> str:
    """The windows that hold most of what each of the two sees."""
    rows = [("attention", view.attention), ("block", view.block)]
    cells = "".join(
        f"<tr><th>{name}</th><td>{_window(reach.within)}</td>"
        f"<td>{_window(reach.receptive_field)}</td></tr>"
        for name, reach in rows
        if reach is not None
    )
    head = (
        f'<tr><th></th><th>{SHARE:.0%} within</th><th title="effective receptive field">ERF</th>'
        "</tr>"
    )
    block = f'<p class="cf-mixer">Block: {_name(view)}</p>' if view.mixer else ""
    return f'<table class="cf-numbers">{head}{cells}</table>{block}'


def _name(view: SiteView) -> str:
    """The kind of a block, and its settings at a touch of the mouse."""
    kind = view.mixer.partition("(")[0]
    return f'<span title="{html.escape(view.mixer)}">{html.escape(kind)}</span>'


def _window(side: int | None) -> str:
    return "–" if side is None else f"{side}×{side}"


def _show_curves(view: SiteView) -> str:
    """The ASM of attention and block by the side of the window, and that of uniform attention."""
    width, height = CURVE
    left, top, bottom = 30, 6, 22

    def draw(mass: Sequence[float], kind: str) -> str:
        points = " ".join(
            f"{left + i / max(1, len(mass) - 1) * (width - left - 8):.1f},"
            f"{top + (1 - value) * (height - top - bottom):.1f}"
            for i, value in enumerate(mass)
        )
        return f'<polyline class="cf-{kind}" points="{points}"/>'

    lines = [draw(view.attention.score_mass, "attention")]
    lines += [] if view.block is None else [draw(view.block.score_mass, "block")]
    lines.append(draw(view.uniform, "uniform"))
    level = top + (1 - SHARE) * (height - top - bottom)
    last = 2 * len(view.uniform) - 1
    return (
        f'<svg viewBox="0 0 {width} {height}" class="cf-curve" role="img" '
        f'aria-label="Score mass by window">'
        f'<line x1="{left}" x2="{width - 8}" y1="{level:.1f}" y2="{level:.1f}"/>'
        f'<text x="{left - 4}" y="{level + 4:.1f}" text-anchor="end">{SHARE:.0%}</text>'
        f'<text x="{left - 4}" y="{height - bottom + 2}" text-anchor="end">0</text>'
        f'{"".join(lines)}<text x="{left}" y="{height - 6}">1×1</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{last}×{last}</text></svg>'
    )
