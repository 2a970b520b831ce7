"""The words and the looks of the page, none of which comes from another host."""

from __future__ import annotations

import html

from convfusion.errors import ConvFusionError, first_line

INTRODUCTION = (
    "The *teacher* is the model with its self-attention, the *student* has blocks in its place, "
    "and *removed* has neither. All three draw from the same noise."
)
WITHOUT_BLOCKS = (
    "The *teacher* is the model with its self-attention, *removed* is without it. Both draw from "
    "the same noise. Name trained blocks with `--blocks` to compare a student, too."
)
HOW_TO_LOOK = "Draw a picture under Compare first. Then click a point of it here."
HOW_TO_EVALUATE = (
    "Name a folder that `convfusion evaluate` wrote, and press Open. For one of the embedded "
    "model: `convfusion evaluate mini --out convfusion-evaluation`"
)
WORDS_OF_CARDS = (
    "Click a point of the picture: each card shows one self-attention layer (*site*). In blue, "
    "where its attention looks from this point, the mean over its heads; in orange, which tokens "
    "the output of its block depends on there. The curves are the *score mass* (ASM): which share "
    "of that lies within K×K tokens around the point; grey is what attention to all tokens alike "
    "would have. *ERF* is the window that holds 80 % of what stands out from its surroundings."
)
FONTS = ["system-ui", "sans-serif"]
CODE_FONTS = ["ui-monospace", "monospace"]

CSS = """
.gradio-container { max-width: 1280px !important; width: 100% !important;
                    margin: 0 auto !important; }
:is(#status, #look-status, #evaluate-status, #views) :is(.html-container, .prose) {
    padding: 0 !important; }
.cf-status { margin: 0; min-height: 1.6em; overflow-wrap: anywhere; }
.cf-wrong { border-left: 4px solid #d55e00; padding-left: .75rem; }
.cf-bar { display: block; height: .5rem; margin-top: .4rem; border-radius: 4px;
          background: var(--border-color-primary); overflow: hidden; }
.cf-bar span { display: block; height: 100%; background: var(--color-accent); }
.cf-pictures { flex-wrap: nowrap !important; }
.cf-pictures img, #slider img, #look-picture img { image-rendering: pixelated; }
@media (max-width: 640px) { .cf-pictures .icon-button-wrapper { display: none; } }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(45%, 210px), 1fr)); }
#look-picture img { cursor: crosshair; }
.cf-cards { --attention: #0072b2; --block: #d55e00; }
.dark .cf-cards { --attention: #56b4e9; --block: #f28e4c; }
.cf-cards { display: grid; gap: .75rem;
            grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.cf-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .75rem;
           min-width: 0; }
.cf-card h3 { margin: 0 0 .5rem !important; font-size: 1rem !important; font-weight: 600; }
.cf-card small { font-weight: 400; opacity: .75; }
.cf-maps { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.cf-maps figure { margin: 0; min-width: 0; }
.cf-maps img { width: 100%; display: block; margin: 0; image-rendering: pixelated; }
.cf-maps figcaption { font-size: .85rem; font-weight: 600; text-align: center; }
.cf-attention { color: var(--attention); } .cf-block { color: var(--block); }
.cf-curve { width: 100%; font-size: 12px; margin-top: .25rem; }
.cf-curve polyline { fill: none; stroke: currentColor; stroke-width: 2; }
.cf-curve .cf-uniform { color: #8c959f; stroke-dasharray: 3 3; }
.cf-curve line { stroke: var(--border-color-primary); }
.cf-curve text { fill: var(--body-text-color); }
.cf-numbers { width: 100%; border: 0 !important; margin: .25rem 0 0 !important; font-size: .85rem;
              font-variant-numeric: tabular-nums; }
.cf-numbers :is(tr, th, td) { border: 0 !important; padding: .1rem .25rem .1rem 0 !important;
                              text-align: left; font-weight: 400; background: none !important; }
.cf-mixer, .cf-none { margin: .25rem 0 0 !important; font-size: .85rem; opacity: .75; }
"""


def say(text: str, *, wrong: bool = False) -> str:
    """A line of the page that tells what happens, as HTML; a screen reader says it, too.

    Args:
        text: plain, with `code` in backquotes.
        wrong: whether it is an error.
    """
    parts = html.escape(text).split("`")
    words = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    role = "alert" if wrong else "status"
    return f'<p class="cf-status{" cf-wrong" if wrong else ""}" role="{role}">{words}</p>'


def show_progress(text: str, done: int, total: int) -> str:
    """A line that tells how far something is, with a bar, as HTML."""
    words = f"{html.escape(text)}, step {done} of {total}"
    bar = f'<span class="cf-bar"><span style="width: {done / total:.0%}"></span></span>'
    return f'<p class="cf-status">{words}{bar}</p>'


def explain(error: Exception) -> str:
    """What an error means to a visitor, in a line."""
    if isinstance(error, ConvFusionError):
        return str(error)
    text = first_line(error) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return f"there is not enough memory for this; try a smaller size ({text})"
    return f"this failed: {text}"
