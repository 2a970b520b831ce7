"""The tables of docs/speed.md: operations counted, times measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from convfusion.bench.counts import denoiser_operations
from convfusion.bench.models import bench_model
from convfusion.bench.rows import ATTENTION, Crossover, Row, find_crossovers, fit_growth, read_rows
from flops_video import FRAMES
from pages import RESULTS, read, table

STEPS = 25  # of a picture
NAMES = {
    "delta_conv 0.5": "ΔConvBlock",
    "delta_conv 0.5 compiled": "ΔConvBlock, compiled",
    "linfusion": "LinFusion",
    "neighbourhood": "13×13 window",
    "tome": "ToMe",
}


def flops_totals(
    file: str = "flops.csv", place: str = "all"
) -> dict[str, dict[tuple[int, int], dict[str, dict[str, str]]]]:
    """Of a CSV the totals over all sites, by model, size in pixels and mixer.

    With the place `denoiser`, those over all layers.
    """
    found = defaultdict(lambda: defaultdict(dict))
    for row in read(file):
        if row["place"] == place:
            size = (int(row["width"]), int(row["height"]))
            found[row["model"]][size][row["mixer"]] = row
    return found


def tera(operations: str) -> str:
    number = float(operations) / 1e12
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def times(row: dict[str, str]) -> str:
    ratio = float(row["attention_over"])
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.1f}×"


def flops() -> str:
    """SD1.5: operations of attention and blocks, and attention's over those of each rival."""
    rivals = {
        "delta_conv 0.5": "ΔConvBlock 1/2",
        "delta_conv 0.25": "ΔConvBlock 1/4",
        "halo 0.25 0.5": "halo",
        "linfusion": "LinFusion",
        "neighbourhood": "13×13 window",
        "tome": "ToMe",
    }
    heads = ["pixels", "attention", "ΔConvBlock 1/2", *(f"over {name}" for name in rivals.values())]
    found = flops_totals()["sd15"]
    lines = []
    for width, height in sorted(found, key=math.prod):
        by = found[width, height]
        own = [tera(by[name]["operations"]) for name in ("attention", "delta_conv 0.5")]
        lines.append([f"{width}×{height}", *own, *(times(by[name]) for name in rivals)])
    return table(heads, lines)


def flops_models() -> str:
    """Attention over ΔConvBlocks of ratio 1/2, for every model."""
    found = flops_totals()
    heads = ["pixels", *(f"`{name}`" for name in found)]
    sizes = sorted(next(iter(found.values())), key=math.prod)
    lines = [
        [f"{w}×{h}", *(times(by[w, h]["delta_conv 0.5"]) for by in found.values())]
        for w, h in sizes
    ]
    return table(heads, lines)


def flops_video() -> str:
    """Videos: attention over blocks, at the sites alone and in the whole denoiser."""
    blocks = {
        "delta_conv 0.5": "ΔConvBlock",
        "halo 0.25 0.5": "halo 1/4, 1/2",
        "halo 0.5 0.5": "halo 1/2, 1/2",
    }
    heads = ["model", "pixels × frames", "attention, 10¹²", "of the denoiser"]
    heads += [f"over {name}" for name in blocks.values()]
    heads += [f"denoiser, {name}" for name in list(blocks.values())[:2]]
    whole = flops_totals("flops_video.csv", "denoiser")
    lines = []
    for model, sizes in flops_totals("flops_video.csv").items():
        for (width, height), by in sizes.items():
            all_of_it = whole[model][width, height]
            own = by["attention"]["operations"]
            share = int(own) / int(all_of_it["attention"]["operations"])
            line = [f"`{model}`", f"{width}×{height} × {FRAMES[model]}", tera(own), f"{share:.0%}"]
            line += [times(by[name]) for name in blocks]
            lines.append([*line, *(times(all_of_it[name]) for name in list(blocks)[:2])])
    return table(heads, lines)


def flops_memory() -> str:
    """SD1.5: the most that one site takes at once."""
    found = flops_totals()["sd15"]
    mixers = list(next(iter(found.values())))
    lines = [["parameters, millions"]]
    lines[0] += [f"{int(found[512, 512][name]['parameters']) / 1e6:.1f}" for name in mixers]
    for width, height in sorted(found, key=math.prod):
        by = found[width, height]
        sizes = [int(by[name]["activation_bytes"]) / 2**20 for name in mixers]
        lines.append([f"MiB at {width}×{height}", *(f"{size:,.0f}" for size in sizes)])
    return table(["", *(f"`{name}`" for name in mixers)], lines)


def flops_halo() -> str:
    """SD1.5: operations of halo blocks beside those of the attention, ΔConvBlock and LinFusion."""
    names = {
        "attention": "attention",
        "delta_conv 0.5": "ΔConvBlock",
        "halo 0.125 0.375": "halo 1/8, 3/8",
        "halo 0.25 0.5": "halo 1/4, 1/2",
        "halo 0.5 0.5": "halo 1/2, 1/2",
        "linfusion": "LinFusion",
    }
    found = flops_totals()["sd15"]
    lines = []
    for size in ((512, 512), (1024, 1024), (4096, 2160), (15360, 8640)):
        by = found[size]
        own = [f"{tera(by[n]['operations'])} ({times(by[n])})" for n in names if n != "attention"]
        lines.append([f"{size[0]}×{size[1]}", tera(by["attention"]["operations"]), *own])
    weights = [f"{int(found[512, 512][n]['parameters']) / 1e6:.1f}" for n in names]
    return table(["pixels", *names.values()], [*lines, ["parameters, millions", *weights]])


def halo_times(training: bool = False, dtype: str = "float32") -> str:
    """CPU time of a call and memory of halo blocks, over those of the ΔConvBlock."""
    kind = {"training": str(training), "dtype": dtype}
    rows = [row for row in read("halo_speed.csv") if kind.items() <= row.items()]
    by: dict[tuple[int, int], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        by[int(row["channels"]), int(row["side"])][row["contender"]] = row
    first = rows[0]["contender"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = []
    for (channels, side), found in by.items():
        own = found[first]
        cells = [f"{milliseconds(float(own['cpu_ms']))}, {float(own['peak_mib']):.0f} MiB"]
        for name in names[1:]:
            row = found.get(name)
            cells.append(
                f"{float(row['over_block']):.2f}×, {float(row['peak_mib']):.0f} MiB" if row else "–"
            )
        lines.append([f"C {channels}, {side}×{side}", *cells])
    return table(["site, tokens", *names], lines)


def halo_growth() -> str:
    """The exponent of the tokens that CPU time grows with, from 32² to 256² tokens at C 320."""
    kind = {"training": "False", "dtype": "float32", "channels": "320"}
    times_of: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read("halo_speed.csv"):
        if kind.items() <= row.items() and row["contender"] != "attention":
            times_of[row["contender"]][int(row["side"]) ** 2] = float(row["cpu_ms"])
    return table(
        ["", *times_of], [["exponent", *(f"{fit_growth(t):.2f}" for t in times_of.values())]]
    )


def measured(file: str = "latency.csv") -> list[Row]:
    return read_rows(RESULTS / file)


def place(row: Row) -> str:
    """`level 0, C 320, K 7`: the kind of site that a row is of."""
    return f"`{row.site.partition('.attentions')[0]}`, C {row.channels}, K {row.kernel_size}"


def milliseconds(value: float) -> str:
    return (
        f"{value / 1e3:,.1f} s"
        if value >= 1e4
        else f"{value:,.0f} ms"
        if value >= 100
        else f"{value:.3g} ms"
    )


def cases(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The variants of each case that was timed, by name, in the order of the file."""
    found: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row.case][row.variant] = row
    return list(found.values())


def faster(by: dict[str, Row], variant: str) -> str:
    """How many times as fast as the attention, with the range that the rounds allow."""
    attention, own = by.get(ATTENTION), by.get(variant)
    if attention is None or own is None or None in (attention.median_ms, own.median_ms):
        return "–"
    ratio = attention.median_ms / own.median_ms
    low, high = attention.fastest_ms / own.slowest_ms, attention.slowest_ms / own.fastest_ms
    digits = 0 if ratio >= 20 else 1 if ratio >= 3 else 2
    return f"**{ratio:.{digits}f}×** ({low:.{digits}f}–{high:.{digits}f})"


def sites(backward: bool = False) -> str:
    rows = [r for r in measured() if r.site and r.backward == backward]
    known = {r.variant for r in rows}
    variants = [name for name in NAMES if name in known]
    heads = ["site, tokens", "attention", *(NAMES[name] for name in variants)]
    lines = []
    for by in cases(rows):
        first = next(iter(by.values()))
        if by[ATTENTION].median_ms is not None:
            own = milliseconds(by[ATTENTION].median_ms)
            ratios = [faster(by, variant) for variant in variants]
            lines.append([f"{place(first)}, {first.tokens:,}", own, *ratios])
    return f"{table(heads, lines)}\n\n{where(rows)}"


def where(rows: list[Row]) -> str:
    first = rows[0]
    rounds = sorted({row.rounds for row in rows if row.rounds})
    return (
        f"{first.device}, {first.threads} threads, {first.dtype}, PyTorch {first.torch}; batch "
        f"{' and '.join(map(str, sorted({row.batch for row in rows})))}; "
        f"{' or '.join(map(str, rounds))} rounds."
    )


def bound(model: str, width: int, height: int) -> float:
    """The denoiser's operations with attention over those with ΔConvBlocks."""
    by = flops_totals()[model][width, height]
    attention, blocks = (int(by[name]["operations"]) for name in (ATTENTION, "delta_conv 0.5"))
    total = denoiser_operations(bench_model(model), (height, width))
    return total / (total - attention + blocks)


def denoiser() -> str:
    rows = [r for r in measured() if not r.site]
    known = {r.variant for r in rows}
    variants = [name for name in NAMES if name in known]
    heads = ["pixels, batch", "attention", *(NAMES[name] for name in variants)]
    heads += ["nothing there", "ΔConvBlock by operations"]
    lines = []
    for by in cases(rows):
        first = next(iter(by.values()))
        size = f"{first.width}×{first.height}, {first.batch}"
        limit = f"{bound(first.model, first.width, first.height):.2f}×"
        own = milliseconds(by[ATTENTION].median_ms)
        ratios = [faster(by, name) for name in (*variants, "removed")]
        lines.append([size, own, *ratios, limit])
    return f"{table(heads, lines)}\n\n{where(rows)}"


def per_picture(row: Row) -> str:
    """What the denoiser takes for one picture, of `STEPS` steps under guidance."""
    seconds = STEPS * 2 / row.batch * row.median_ms / 1e3
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def headline() -> str:
    """SD1.5's whole denoiser, a picture, and its first site: attention over blocks."""
    rows = [r for r in measured() if not r.backward]
    by_size = {(by[ATTENTION].width, bool(by[ATTENTION].site)): by for by in reversed(cases(rows))}
    blocks = "delta_conv 0.5"
    lines = []
    for width in (512, 1024, 2048):
        whole, site = by_size[width, False], by_size.get((width, True), {})
        pictures = [per_picture(whole[name]) for name in (ATTENTION, blocks)]
        fewer = times(flops_totals()["sd15"][width, width][blocks])
        ratios = [faster(whole, blocks), *pictures, faster(site, blocks), fewer]
        lines.append([f"{width}×{width}", *ratios])
    heads = ["SD1.5", "whole denoiser: faster", "a picture with attention", "with blocks"]
    heads += ["one site, the first: faster", "all sites: fewer operations"]
    return f"""{table(heads, lines)}

{where(rows).partition("; ")[0]}. A picture: the denoiser's
time for {STEPS} steps under classifier-free guidance, which are two samples a step, worked out from
that of one call."""


def crossover() -> str:
    """From which size on each variant is the faster one, per kind of site and for the whole."""
    rows = measured()
    names = {
        row.series: place(row) if row.site else f"the whole denoiser, batch {row.batch}"
        for row in rows
    }
    found: dict[tuple, dict[str, Crossover]] = defaultdict(dict)
    for each in find_crossovers(row for row in rows if not row.backward):
        found[each.series][each.variant] = each
    variants = [name for name in NAMES if any(name in by for by in found.values())]
    lines = []
    for series, by in found.items():
        sizes = sorted(next(iter(by.values())).speedup)
        span = " – ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
        lines.append([names[series], span, *(said(by.get(v)) for v in variants)])
    return table(["", "tokens measured", *(NAMES[name] for name in variants)], lines)


def said(found: Crossover | None) -> str:
    if found is None:
        return "–"
    if found.tokens is None:
        return "at none of them"
    return "at all of them" if found.always else f"from about {found.tokens:,.0f} tokens"


def least() -> str:
    """Of what was timed alike, where the ΔConvBlock gains least: a site, or the denoiser."""
    groups: dict[tuple, list[tuple[float, dict[str, Row]]]] = defaultdict(list)
    for by in cases(measured()):
        timed = [by[name].median_ms for name in (ATTENTION, "delta_conv 0.5") if name in by]
        if len(timed) == 2 and None not in timed:
            first = by[ATTENTION]
            kind = (first.model, first.device, first.dtype, first.backward, bool(first.site))
            groups[kind].append((timed[0] / timed[1], by))
    lines = []
    for (model, device, dtype, backward, one_site), found in groups.items():
        worst = min(found, key=lambda case: case[0])[1]
        first = worst[ATTENTION]
        size = f"{first.width}×{first.height}"
        at = f"{place(first)}, {first.tokens:,} tokens" if one_site else f"the whole, {size}"
        what = ", ".join([f"`{model}`", device, dtype] + ["with gradients"] * backward)
        slower = sum(ratio <= 1 for ratio, _ in found)
        lines.append([what, str(len(found)), str(slower), at, faster(worst, "delta_conv 0.5")])
    heads = ["", "cases", "of them not faster", "the least gain is at", "attention over block"]
    return f"""{table(heads, lines)}

Medians, and the range that the rounds allow. From [results/latency.csv](../results/latency.csv)."""


HALO = "halo 0.25 0.5"


def gpu_denoiser() -> str:
    """Whole denoisers on GPUs: attention, and how many times as fast it is with blocks."""
    heads = ["model", "pixels, batch", "how", "attention", "ΔConvBlock", "halo block"]
    heads.append("nothing there")
    lines = []
    for by in cases(row for row in measured("latency_gpu.csv") if not row.site):
        first = by[ATTENTION]
        size = f"{first.width}×{first.height}, {first.batch}"
        how = f"{first.device}, {first.dtype}"
        own = milliseconds(first.median_ms)
        ratios = [faster(by, name) + mark(by, name) for name in ("delta_conv 0.5", HALO, "removed")]
        lines.append([f"`{first.model}`", size, how, own, *ratios])
    return table(heads, lines)


def gpu_sites() -> str:
    """Sites of SD1.5 on a GPU, called one by one from Python."""
    rows = [row for row in measured("latency_gpu.csv") if row.site]
    lines = []
    for by in cases(rows):
        own = milliseconds(by[ATTENTION].median_ms)
        ratios = [faster(by, name) + mark(by, name) for name in ("delta_conv 0.5", HALO)]
        lines.append([f"{place(by[ATTENTION])}, {by[ATTENTION].tokens:,}", own, *ratios])
    return table(["site, tokens", "attention", "ΔConvBlock", "halo block"], lines)


def mark(by: dict[str, Row], variant: str) -> str:
    """A star where what was timed was an earlier version."""
    return " *" if variant in by and by[variant].note else ""


def exponents() -> str:
    """The exponent e of time ∝ Nᵉ and of memory ∝ Nᵉ, per kind of site and variant."""
    found: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    names = {}
    for row in measured():
        if row.site and not row.backward and row.median_ms is not None:
            found[row.series][row.variant].append(row)
            names[row.series] = place(row)
    variants = (ATTENTION, *NAMES)
    known = [v for v in variants if any(v in by for by in found.values())]
    heads = ["", *(NAMES.get(v, v) for v in known)]
    lines = [[names[s], *(exponent(by.get(v, [])) for v in known)] for s, by in found.items()]
    return table(heads, lines)


def exponent(rows: list[Row]) -> str:
    if len(rows) < 3:
        return "–"
    time = fit_growth({row.tokens: row.median_ms for row in rows})
    peaks = {row.tokens: row.peak_mib for row in rows if row.tokens >= 4096}
    memory = f"{fit_growth(peaks):.2f}" if len(peaks) > 1 else "–"
    low, high = (min(r.tokens for r in rows), max(r.tokens for r in rows))
    return f"{time:.2f}, {memory} ({low:,} – {high:,})"


def layouts() -> str:
    rows = read("layouts.csv")
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != "block"))
    found = {(r["channels"], r["side"], r["kernel_size"], r["dtype"], r["way"]): r for r in rows}
    lines = []
    for key in dict.fromkeys(key[:4] for key in found):
        channels, side, kernel, dtype = key
        own = [found[(*key, way)] for way in ways]
        cells = [f"{r['over_block']} ({r['over_block_low']}–{r['over_block_high']})" for r in own]
        lines.append([f"C {channels}, {side}×{side}, K {kernel}, {dtype}", *cells])
    return table(["", *ways], lines)


TABLES: dict[str, Callable[[], str]] = {
    "flops": flops,
    "flops models": flops_models,
    "flops memory": flops_memory,
    "flops video": flops_video,
    "flops halo": flops_halo,
    "halo times": halo_times,
    "halo bfloat16": partial(halo_times, dtype="bfloat16"),
    "halo training": partial(halo_times, training=True),
    "halo growth": halo_growth,
    "latency": sites,
    "latency backward": lambda: sites(backward=True),
    "denoiser": denoiser,
    "crossover": crossover,
    "least": least,
    "growth": exponents,
    "gpu denoiser": gpu_denoiser,
    "gpu sites": gpu_sites,
    "layouts": layouts,
    "headline": headline,
}
