"""The report of an analysis: `analysis.json`, figures as PNG, and one self-contained page."""

from __future__ import annotations

import html
import math
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from convfusion import report
from convfusion.analysis import plots
from convfusion.analysis.kernel_sizes import recommend
from convfusion.analysis.statistics import name_grid
from convfusion.analysis.study import Analysis, FrameAnalysis, SiteAnalysis
from convfusion.analysis.verdict import check_claims, give_verdict
from convfusion.families import shorten_path
from convfusion.files import write_picture, write_text
from convfusion.mixers.delta_conv import DeltaConv

WINDOWS = ((1, 3), (3, 3), (3, 7), (5, 9))  # frames and side, of the table of videos
CAPTIONS = {
    "receptive_fields": (
        "Effective receptive field",
        "The smallest window that holds {share:.0%} of what a query attends to above its smooth "
        "surroundings (Λ⁺, the positive high-frequency part of its map). A field near the black "
        "mark, that of uniform attention on the same grid, is no locality. The bar spans other "
        "filters. A star marks layers whose attention goes to a few sink tokens: their field says "
        "nothing about locality.",
    ),
    "score_mass": (
        "Attention score mass",
        "Share of attention within a K×K window round the query, clipped at the border; of the "
        "mean map over heads, timesteps and pictures.",
    ),
    "slopes": ("Slope of the score mass", "What one more token of window side adds."),
    "decay": (
        "Decay with distance",
        "Mean attention of a query to a key at each distance, in the mean map, and the laws fitted "
        "to it: a constant bias b, and above it a power b + a·d^(−s), the quadratic one, or an "
        "exponential b + a·exp(−d/ℓ). Both axes are logarithmic.",
    ),
    "timesteps": (
        "Dependence on the timestep",
        "Single maps (mean over heads of one picture), averaged. One line per layer.",
    ),
    "mean_maps": (
        "Mean maps",
        "Where five queries attend, averaged over heads, timesteps and pictures. A ring marks the "
        "query. Each map has its own scale, from 0 (black).",
    ),
    "frame_mass": (
        "Attention score mass in time",
        "Share of attention within so many frames round the query's own, at any place in them; of "
        "the mean map. At 1 it is what stays in the query's own frame. Frames are those of the "
        "latents.",
    ),
    "strips": (
        "Mean maps, frame by frame",
        "Where one query attends, averaged over heads, timesteps and videos: the token in the "
        "middle of the middle frame, marked by a ring. All frames of a layer have one scale, from "
        "0 (black).",
    ),
}


def write_report(analysis: Analysis, folder: str | Path, control: Analysis | None = None) -> None:
    """Write `analysis.json`, `kernels.json`, the PNGs and `report.html` to a folder.

    Args:
        analysis: of the model.
        folder: made if need be.
        control: of an untrained model of the same shape, shown beside it and written to
            `control.json`.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    analysis.save(out / "analysis.json")
    figures = draw_figures(analysis, control)
    images = {}
    for name, figure in figures.items():
        images[name] = report.render_figure(figure)
        write_picture(out / f"{name}.png", images[name], optimize=True)
    recommend(analysis).save(out / "kernels.json")
    if control is not None:
        control.save(out / "control.json")
    write_text(out / "report.html", build_page(analysis, images, control))


def draw_figures(analysis: Analysis, control: Analysis | None) -> dict[str, Figure]:
    """Every figure by name, in the order of the page."""
    of_video = any(site.frames is not None for site in analysis.sites)
    figures = {
        "receptive_fields": plots.receptive_fields(analysis, control),
        "score_mass": plots.score_mass(analysis),
    }
    if of_video:
        figures["frame_mass"] = plots.frame_mass(analysis)
    return figures | {
        "slopes": plots.slopes(analysis),
        "decay": plots.decay(analysis),
        "timesteps": plots.timesteps(analysis),
        "strips" if of_video else "mean_maps": plots.mean_maps(analysis),
    }


def build_page(analysis: Analysis, images: dict[str, Image.Image], control: Analysis | None) -> str:
    """The report as one page that needs no other file."""
    config = analysis.config
    beside = "" if control is None else " and of an untrained model of the same shape"
    counts = [dict(check_claims(each)) for each in (analysis, control) if each is not None]
    rows = [(html.escape(claim), *(count[claim] for count in counts)) for claim in counts[0]]
    heads = ("claim of the paper", "layers of this model", "untrained")[: 1 + len(counts)]
    body = [
        "<h1>What self-attention does here</h1>",
        report.show_verdict(give_verdict(analysis, control)),
        f"<p>Analysis of {html.escape(analysis.model)}{beside}: {len(analysis.sites)} "
        f"self-attention layers, watched while the model drew {len(analysis.prompts)} "
        f"prompt{'s' * (len(analysis.prompts) > 1)} in {config.steps} steps at guidance "
        f"{config.guidance:g}, at timesteps {', '.join(map(str, analysis.timesteps))}. "
        f"High-pass: Butterworth of order {config.measure.high_pass.order}, cut-off "
        f"{config.measure.high_pass.cutoff:g} cycles per side of the grid. {report.HINT}</p>",
        report.show_table(heads, rows),
        "<h2>Layer by layer</h2>",
        _show_layers(analysis),
        '<p class="note">ERF is given of the mean map, then of single maps; “uniform” is the ERF '
        "that uniform attention has on the grid. Entropy is 1 for uniform attention. “In common” "
        "is the share of the map, and of its low-frequency part, that all queries have in common. "
        "Decay: power with its exponent, exponential with its length in tokens. "
        "The last column is what <code>kernels.json</code> recommends.</p>",
        *_show_frames(analysis),
        *_show_text(analysis),
        "<h2>Where attention gathers</h2>",
        _show_gathering(analysis),
        '<p class="note">How many times the attention that uniform attention would give it a token '
        "receives, in single maps: one of the first frame, from queries of later frames; one in a "
        "corner of its frame; one of the strongest hundredth of a map; and the strongest one. "
        "1 is nothing special. A block that looks around each token misses what gathers far from "
        "it.</p>",
    ]
    for name, image in images.items():
        title, text = CAPTIONS[name]
        body.append(f"<h2>{title}</h2><p>{text.format(share=config.share)}</p>")
        body.append(report.show_picture(image, title))
    return report.fill_page("Self-attention, layer by layer", "\n".join(body))


def _show_layers(analysis: Analysis) -> str:
    heads = ("layer", "grid", "ERF", "uniform", "entropy", "high-frequency", "in common", "decay")
    kernels = recommend(analysis).sites
    rows = []
    for site in analysis.sites:
        block = kernels[site.path]
        assert isinstance(block, DeltaConv)
        rows.append((*_write_cells(site), _write_kernel(block)))
    return report.show_table((*heads, "sinks", "kernel"), rows, kind="dense")


def _write_kernel(block: DeltaConv) -> str:
    frames = f", {block.frame_kernel_size} frames" if block.frame_kernel_size else ""
    return f"{block.kernel_size}, {block.stages} st.{frames}"


def _show_frames(analysis: Analysis) -> list[str]:
    """The table of space and time, of videos."""
    rows = []
    for site in analysis.sites:
        if site.frames is None or site.mean.frames is None:
            continue
        own, all_own = site.mean.frames.score_mass[0], site.frames.uniform_score_mass[0]
        rows.append(
            (
                html.escape(shorten_path(site.path)),
                name_grid(site.grid),
                f"{site.mean.receptive_field or '–'} of {site.uniform_receptive_field}",
                f"{site.mean.frames.receptive_field or '–'} of "
                f"{site.frames.uniform_receptive_field}",
                f"{own:.0%} ({all_own:.0%})",
                *(_write_window(site.frames, *window) for window in WINDOWS),
            )
        )
    if not rows:
        return []
    windows = (f"{frames}×{side}×{side}" for frames, side in WINDOWS)
    heads = ("layer", "grid", "ERF in space", "ERF in frames", "own frame", *windows)
    return [
        "<h2>In space and in time</h2>",
        report.show_table(heads, rows, kind="dense"),
        '<p class="note">ERF of the mean map, and that of uniform attention on the grid. Then the '
        "share of the attention that stays in the query's own frame, and within windows of so many "
        "frames, rows and columns round the query; in brackets the share of uniform attention, "
        "which is the share of all tokens that lie there. Frames are those of the latents.</p>",
    ]


def _show_text(analysis: Analysis) -> list[str]:
    """The table of what goes to a text, where image and text share an attention."""
    texts = [(site, site.text) for site in analysis.sites if site.text is not None]
    if not texts:
        return []
    times = list(texts[0][1].timesteps)
    rows = [
        (
            html.escape(shorten_path(site.path)),
            f"{text.words:.0f} beside {math.prod(site.grid)}",
            f"{text.share:.1%} ({text.uniform_share:.1%})",
            "–" if text.padding is None else f"{text.padding:.1%}",
            f"{min(text.heads):.0%} – {max(text.heads):.0%}",
            *(f"{text.timesteps[time]:.1%}" for time in times),
        )
        for site, text in texts
    ]
    heads = ("layer", "tokens", "text", "padding", "heads", *(f"t = {time}" for time in times))
    return [
        "<h2>Image and text</h2>",
        report.show_table(heads, rows, kind="dense"),
        '<p class="note">Here image and text share an attention. The share of what the tokens of '
        "the image attend to that is text, and in brackets that of uniform attention; the part of "
        "it that is padding, where that is known; the least and the largest share of a head; and "
        "the share at each timestep. All other tables of such a layer are about what its tokens of "
        "the image attend to among each other.</p>",
    ]


def _write_window(frames: FrameAnalysis, count: int, side: int) -> str:
    """Shares of a window, which is clipped to the grid: of the attention, and of uniform one."""
    shares = []
    for table in (frames.within, frames.uniform_within):
        line = table[min(count // 2, len(table) - 1)]
        shares.append(line[min(side // 2, len(line) - 1)])
    return f"{shares[0]:.0%} ({shares[1]:.0%})"


def _show_gathering(analysis: Analysis) -> str:
    rows = []
    for site in analysis.sites:
        found = site.single.gathering
        numbers = (found.first_frame, found.corners, found.few, found.strongest)
        cells = ("–" if number is None else f"{number:.2f}×" for number in numbers)
        rows.append((html.escape(shorten_path(site.path)), name_grid(site.grid), *cells))
    heads = ("layer", "grid", "first frame", "corners", "strongest 1 %", "strongest token")
    return report.show_table(heads, rows, kind="dense")


def _write_cells(site: SiteAnalysis) -> tuple[str, ...]:
    mean, single = site.mean, site.single
    fit = mean.decay
    return (
        html.escape(shorten_path(site.path)),
        name_grid(site.grid),
        f"{mean.receptive_field or '–'}, {single.receptive_field or '–'}",
        str(site.uniform_receptive_field),
        f"{mean.entropy:.2f}, {single.entropy:.2f}",
        f"{mean.high_share:.1%}",
        f"{mean.bias_share:.0%}, {mean.bias_share_low:.0%}",
        "–" if fit is None else plots.law(fit),
        f"{single.sink_mass:.0%}" + (" *" if site.artefact else ""),
    )
