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
    figures = draw(analysis, control)
    images = {}
    for name, figure in figures.items():
        images[name] = report.render_figure(figure)
        write_picture(out / f"{name}.png", images[name], optimize=True)
    recommend(analysis).save(out / "kernels.json")
    if control is not None:
        control.save(out / "control.json")
    write_text(out / "report.html", page(analysis, images, control))


def draw(analysis: Analysis, control: Analysis | None) -> dict[str, Figure]:
    """Every figure by name, in the order of the page."""
    return {
        "receptive_fields": plots.receptive_fields(analysis, control),
        "score_mass": plots.score_mass(analysis),
        "slopes": plots.slopes(analysis),
        "decay": plots.decay(analysis),
        "timesteps": plots.timesteps(analysis),
        "mean_maps": plots.mean_maps(analysis),
    }


def claims(analysis: Analysis) -> list[tuple[str, str]]:
    """The paper's claims, and for how many layers of this model each one holds."""
    sites = [site for site in analysis.sites if not site.artefact]
    count, flagged = len(sites), len(analysis.sites) - len(sites)

    def holds(found: list[bool]) -> str:
        return f"{sum(found)} of {count}"

    local = [
        s.mean.receptive_field is not None
        and s.mean.receptive_field <= s.uniform_receptive_field / 2
        for s in sites
    ]
    fits = [s.mean.decay for s in sites if s.mean.decay]
    told = [fit.best if fit.r2[fit.best] >= 0.9 else "" for fit in fits]
    falls = [law in ("power", "quadratic") for law in told]
    square = [
        law == "quadratic" or (law == "power" and 1.5 <= fit.exponent <= 2.5)
        for law, fit in zip(told, fits, strict=True)
    ]
    bias = [s.mean.bias_share_low >= 0.9 for s in sites]
    fitted = f"of {len(fits)} with five distances or more"
    return [
        ("Local: the ERF is at most half of that of uniform attention", holds(local)),
        (
            "Above a constant, a power of the distance fits the fall best, and well (R² ≥ 0.9)",
            f"{sum(falls)} {fitted}",
        ),
        ("… a power near 2: of 1.5 to 2.5, or the quadratic law", f"{sum(square)} {fitted}"),
        ("The low-frequency part is one bias: queries share at least 90 % of it", holds(bias)),
        ("Layers set apart because sink tokens take their attention", str(flagged)),
    ]


def page(analysis: Analysis, images: dict[str, Image.Image], control: Analysis | None) -> str:
    """The report as one page that needs no other file."""
    config = analysis.config
    beside = "" if control is None else " and of an untrained model of the same shape"
    cells = "".join(
        f"<tr><td>{html.escape(claim)}</td><td>{found}</td>"
        + (f"<td>{other}</td></tr>" if control else "</tr>")
        for (claim, found), (_, other) in zip(
            claims(analysis), claims(control or analysis), strict=True
        )
    )
    heads = "<th>claim of the paper</th><th>layers of this model</th>"
    heads += "<th>untrained</th>" if control else ""
    body = [
        "<h1>What self-attention does here</h1>",
        f"<p>Analysis of {html.escape(analysis.model)}{beside}: {len(analysis.sites)} "
        f"self-attention layers, watched while the model drew {len(analysis.prompts)} "
        f"prompt{'s' * (len(analysis.prompts) > 1)} in {config.steps} steps at guidance "
        f"{config.guidance:g}, at timesteps {', '.join(map(str, analysis.timesteps))}. "
        f"High-pass: Butterworth of order {config.measure.high_pass.order}, cut-off "
        f"{config.measure.high_pass.cutoff:g} cycles per side of the grid.</p>",
        f"<table><tr>{heads}</tr>{cells}</table>",
        "<h2>Layer by layer</h2>",
        _table(analysis),
        '<p class="note">ERF is given of the mean map, then of single maps; “uniform” is the ERF '
        "that uniform attention has on the grid. Entropy is 1 for uniform attention. “In common” "
        "is the share of the map, and of its low-frequency part, that all queries have in common. "
        "Decay: power with its exponent, exponential with its length in tokens. "
        "The last column is what <code>kernels.json</code> recommends.</p>",
    ]
    for name, image in images.items():
        title, text = CAPTIONS[name]
        body.append(f"<h2>{title}</h2><p>{text.format(share=config.share)}</p>")
        body.append(f'<p><img alt="{title}" src="{report.data_uri(image)}"></p>')
    return report.PAGE.format(title="Self-attention, layer by layer", body="\n".join(body))


def _table(analysis: Analysis) -> str:
    heads = ("layer", "grid", "ERF", "uniform", "entropy", "high-frequency", "in common", "decay")
    head = "".join(f"<th>{name}</th>" for name in (*heads, "sinks", "kernel"))
    kernels = recommend(analysis).sites
    rows = []
    for site in analysis.sites:
        block = kernels[site.path]
        assert isinstance(block, DeltaConv)
        cells = (*_cells(site), f"{block.kernel_size}, {block.stages} st.")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table class="dense"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _cells(site: SiteAnalysis) -> tuple[str, ...]:
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
