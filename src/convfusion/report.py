"""Pictures with labels, and self-contained HTML pages."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from convfusion.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_SIDE = 128  # smaller pictures are enlarged to about this, each pixel a square
DELTA = 0.75  # width of a drawn Δ, as a share of the size of the type
RESOLUTION = 110  # dots per inch of a figure

# Okabe and Ito's colours, which tell apart under the common kinds of colour blindness.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
GREY, INK, FAINT, PAPER = "#8c959f", "#1b1f24", "#d8dee4", "white"

NARROWEST = 720  # pixels that a picture is never shown narrower than: small screens scroll

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1150px;
       margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.verdict {{ font-size: 1.1rem; border-left: 4px solid #0072b2; padding: .1rem 0 .1rem 1rem; }}
.scroll {{ display: block; overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .35rem 1rem; text-align: right; border-bottom: 1px solid #d8dee4;
       font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
td {{ white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; white-space: normal;
       min-width: 9rem; }}
.dense {{ font-size: .85rem; }} .dense th, .dense td {{ padding: .2rem .5rem; }}
.dense th:first-child, .dense td:first-child {{ padding-left: 0; min-width: 7rem; }}
@media (max-width: 40rem) {{ th, td {{ padding: .3rem .5rem; }} }}
tr.grey td {{ color: #57606a; }}
.note {{ color: #57606a; }}
.picture {{ display: block; margin: 1rem 0; }}
.picture img {{ display: block; width: 100%; max-width: var(--width);
       min-width: min(var(--width), var(--narrowest)); cursor: zoom-in; }}
.picture input {{ position: absolute; opacity: 0; }}
.picture input:focus-visible + .scroll {{ outline: 2px solid #0072b2; }}
.picture input:checked + .scroll img {{ width: var(--width); max-width: none; cursor: zoom-out; }}
</style></head><body>
{body}
</body></html>
"""
HINT = "Click or tap a picture to see it in full size; wide tables and pictures scroll sideways."


def fill_page(title: str, body: str) -> str:
    """A self-contained HTML page that reads well on a telephone, too.

    Args:
        title: plain text.
        body: HTML.
    """
    return _PAGE.format(title=html.escape(title), body=body)


def show_verdict(sentences: str) -> str:
    """What a report says first, in plain words, as HTML; `sentences` is plain text."""
    whole = sentences.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return f'<p class="verdict">{html.escape(whole)}</p>'


def show_picture(image: Image.Image, words: str) -> str:
    """A picture as HTML: as wide as the page, and in full size once it is clicked or tapped.

    Args:
        image: becomes a part of the page.
        words: what it shows, for those who cannot see it; plain text.
    """
    return _show(embed_picture(image), image.width, words)


def show_animation(pictures: Sequence[Image.Image], rate: float, words: str) -> str:
    """Pictures of one size that follow each other again and again, as `show_picture` shows one.

    Args:
        pictures: in their order.
        rate: how many are shown in a second.
        words: what they show, for those who cannot see it; plain text.
    """
    return _show(embed_animation(pictures, rate), pictures[0].width, words)


def _show(address: str, width: int, words: str) -> str:
    alt, sizes = html.escape(words), f"--width: {width}px; --narrowest: {NARROWEST}px"
    return (
        f'<label class="picture" style="{sizes}"><input type="checkbox" '
        f'aria-label="Full size: {alt}"><span class="scroll"><img alt="{alt}" '
        f'src="{address}"></span></label>'
    )


def show_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    kind: str = "",
    grey: Sequence[bool] | None = None,
) -> str:
    """A table as HTML, which scrolls where it is wider than the screen.

    Args:
        heads: of the columns, HTML.
        rows: their cells, HTML; only those of the first column break into lines.
        kind: class of the table, such as `dense`.
        grey: which rows are written in grey.
    """
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        f"<tr{' class=grey' if faint else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for row, faint in zip(rows, grey or [False] * len(rows), strict=True)
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def draw_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    columns: int | None = None,
    notes: Mapping[str, str] | None = None,
) -> Image.Image:
    """Pictures in rows, a name above each row and a prompt under each column.

    Args:
        rows: pictures by name, as many as prompts.
        prompts: one for each column.
        columns: after so many, all rows go on below; None is never.
        notes: what is said once beside the name of a row, where it stands first.
    """
    step = columns or len(prompts)
    first = {name: f"{name}: {note}" for name, note in (notes or {}).items()}
    bands = [
        _draw_band(
            {
                (first.get(name, name) if i == 0 else name): images[i : i + step]
                for name, images in rows.items()
            },
            prompts[i : i + step],
        )
        for i in range(0, len(prompts), step)
    ]
    if len(bands) == 1:
        return bands[0]
    gap = 18
    height = sum(band.height for band in bands) + gap * (len(bands) - 1)
    sheet = Image.new("RGB", (max(band.width for band in bands), height), PAPER)
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height + gap
    return sheet


def _draw_band(rows: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """The rows of a grid, as far as they go side by side.

    The type is large, since five columns are shown on a telephone at half their size.
    """
    large, small = ImageFont.load_default(23), ImageFont.load_default(19)
    picture = next(iter(rows.values()))[0]
    scale = max(1, SHOWN_SIDE // picture.width)
    width, height = picture.width * scale, picture.height * scale
    gap, above, line = 6, 36, 23
    names = [one_line(name) for name in rows]
    captions = [
        textwrap.fill(one_line(prompt), max(12, width // 10), max_lines=4, placeholder=" …")
        for prompt in prompts
    ]
    needed = max(_measure_line(name, large) for name in names) + 4
    below = line * max(caption.count("\n") + 1 for caption in captions) + 12
    size = (
        max((width + gap) * len(prompts), math.ceil(needed)),
        (above + height + gap) * len(rows) + below,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(zip(names, rows.values(), strict=True)):
        top = r * (above + height + gap)
        _draw_line(draw, (2, top + 26), name, large)
        for c, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (c * (width + gap), top + above))
    for c, caption in enumerate(captions):
        box = (c * (width + gap) + width // 2, size[1] - below + 2)
        draw.multiline_text(box, caption, fill=INK, font=small, anchor="ma", align="center")
    return sheet


def _measure_line(text: str, font: Any) -> float:
    """Width in pixels of what `_draw_line` draws."""
    deltas = text.count("Δ")
    return float(font.getlength(text.replace("Δ", ""))) + deltas * font.size * DELTA


def _draw_line(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, font: Any) -> None:
    """A line of text from a point of its baseline; Pillow's own font has no Δ, so it is drawn."""
    x, y = place
    for i, part in enumerate(text.split("Δ")):
        if i:
            side = font.size * DELTA
            corners = [(x + 1, y - 1), (x + side / 2, y - font.size * 0.72), (x + side - 2, y - 1)]
            draw.polygon(corners, outline=INK, width=2)
            x += side
        draw.text((x, y), part, fill=INK, font=font, anchor="ls")
        x += font.getlength(part)


def format_psnr(psnr: float | None, error: float | None) -> str:
    """A mean PSNR with its standard error; None is of equal pictures, and of a single one."""
    if psnr is None:
        return "equal"
    return f"{psnr:.1f} dB" if error is None else f"{psnr:.1f} ± {error:.1f} dB"


def draw_loss_curve(values: Sequence[float], width: int = 700, height: int = 220) -> str:
    """A line of positive values over steps, on a logarithmic axis with labelled decades, as SVG."""
    logs = [math.log10(max(value, 1e-12)) for value in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)
    left, bottom = 60, 28

    def x(i: int) -> float:
        return left + i / max(1, len(logs) - 1) * (width - left - 10)

    def y(log: float) -> float:
        return 8 + (high - log) / (high - low) * (height - bottom - 8)

    lines = "".join(
        f'<line x1="{left}" x2="{width - 10}" y1="{y(d):.1f}" y2="{y(d):.1f}" stroke="#d8dee4"/>'
        f'<text x="{left - 8}" y="{y(d) + 4:.1f}" text-anchor="end">{10.0**d:.0e}</text>'
        for d in range(low, high + 1)
    )
    points = " ".join(f"{x(i):.1f},{y(log):.1f}" for i, log in enumerate(logs))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width:100%" '
        f'font-size="12" fill="#57606a">{lines}'
        f'<text x="{left}" y="{height - 6}">step 1</text>'
        f'<text x="{width - 10}" y="{height - 6}" text-anchor="end">step {len(logs)}</text>'
        f'<polyline points="{points}" fill="none" stroke="#0072b2" stroke-width="2"/></svg>'
    )


def embed_picture(image: Image.Image) -> str:
    """A picture as a `data:` address of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def embed_animation(pictures: Sequence[Image.Image], rate: float) -> str:
    """Pictures, `rate` of them in a second, as a `data:` address of a WebP that repeats."""
    buffer = io.BytesIO()
    first, *rest = pictures
    delay = round(1000 / rate)
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=delay, quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_figure(figure: Figure) -> Image.Image:
    """A figure as pixels, with a palette, which keeps the page small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION)
    image = Image.open(buffer).convert("RGB")
    return image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
