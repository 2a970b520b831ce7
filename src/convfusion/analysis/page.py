"""The report of an analysis: `analysis.json`, figures as PNG, and one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from convfusion import report
from convfusion.analysis import plots
from convfusion.analysis.kernel_sizes import recommend
from convfusion.analysis.study import Analysis, SiteAnalysis
from convfusion.analysis.verdict import check_claims, give_verdict
from convfusion.families import shorten_path
from convfusion.files import write_picture, write_text
from convfusion.mixers.delta_conv import DeltaConv

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
    return {
        "receptive_fields": plots.receptive_fields(analysis, control),
        "score_mass": plots.score_mass(analysis),
        "slopes": plots.slopes(analysis),
        "decay": plots.decay(analysis),
        "timesteps": plots.timesteps(analysis),
        "mean_maps": plots.mean_maps(analysis),
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
        rows.append((*_write_cells(site), f"{block.kernel_size}, {block.stages} st."))
    return report.show_table((*heads, "sinks", "kernel"), rows, kind="dense")


def _write_cells(site: SiteAnalysis) -> tuple[str, ...]:
    mean, single = site.mean, site.single
    fit = mean.decay
    return (
        html.escape(shorten_path(site.path)),
        f"{site.grid[0]}×{site.grid[1]}",
        f"{mean.receptive_field or '–'}, {single.receptive_field or '–'}",
        str(site.uniform_receptive_field),
        f"{mean.entropy:.2f}, {single.entropy:.2f}",
        f"{mean.high_share:.1%}",
        f"{mean.bias_share:.0%}, {mean.bias_share_low:.0%}",
        "–" if fit is None else plots.law(fit),
        f"{single.sink_mass:.0%}" + (" *" if site.artefact else ""),
    )
