"""What is measured on the video teacher, as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

from convfusion.bench.rows import ATTENTION, fit_growth
from pages import one, read, table
from speed_tables import HALO, measured, milliseconds

NAMES = {"delta_conv 0.5": "ΔConvBlock", HALO: "halo block"}


def videos() -> str:
    """Students of the video teacher, with two, three or all of its layers replaced."""
    found = read("videos.csv")
    groups: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for row in found:
        groups[row["blocks"], int(row["layers"])].append(row)
    lines = []
    order = list(dict.fromkeys(blocks for blocks, _ in groups))
    for (blocks, layers), own in sorted(
        groups.items(), key=lambda g: (order.index(g[0][0]), g[0][1])
    ):
        errors = [float(row["velocity_error"]) for row in own]
        spread = f" ({min(errors):.3f} … {max(errors):.3f})" if len(errors) > 1 else ""
        saved = int(own[0]["attention_operations"]) / max(1, int(own[0]["operations"]))
        lines.append(
            [
                f"{blocks}, {own[0]['steps']} steps" if int(own[0]["steps"]) else blocks,
                str(layers),
                f"{statistics.mean(errors):.3f}{spread}",
                mean_of(own, "psnr", "dB"),
                mean_of(own, "flicker_ratio", "×"),
                f"{saved:.1f}×" if int(own[0]["operations"]) else "all",
            ]
        )
    heads = ["in place of the attention", "layers of 6", "velocity error", "PSNR of clips"]
    heads += ["flicker, over the teacher's", "fewer operations there"]
    [held_out] = one(found, "held_out")
    return f"""On clips of the list `{held_out}`, pairs of emoji and motion that no training saw.

{table(heads, lines)}"""


def mean_of(own: list[dict[str, str]], name: str, unit: str) -> str:
    """The mean over seeds, with the mean standard error over clips."""
    mean, error = (
        statistics.mean(float(row[column]) for row in own) for column in (name, f"{name}_error")
    )
    return f"{mean:.1f} ± {error:.1f} {unit}" if unit == "dB" else f"{mean:.2f} ± {error:.2f}"


def locality() -> str:
    """How local each layer of the video teacher is, beside uniform attention."""
    heads = [
        "layer",
        "in its own frame",
        "within 3×3×3",
        "within 5×5×5",
        "a token of the first frame",
    ]
    heads += ["its strongest hundredth of the tokens", "field, tokens a side", "field, frames"]
    lines = []
    for row in read("video_locality.csv"):
        if row["model"] != "teacher":
            continue
        pairs = [
            f"{100 * float(row[name]):.0f} % ({100 * float(row[f'uniform_{name}']):.0f} %)"
            for name in ("own_frame", "3x3x3", "5x5x5")
        ]
        lines.append(
            [
                row["layer"].removesuffix(".attn1"),
                *pairs,
                f"{float(row['first_frame']):.1f}×",
                f"{float(row['strongest_hundredth']):.1f}×",
                f"{float(row['field']):.1f} ({float(row['uniform_field']):.1f})",
                f"{float(row['frames_field']):.1f} ({float(row['uniform_frames_field']):.1f})",
            ]
        )
    return table(heads, lines)


def starts() -> str:
    """How well what stands at a layer imitates its attention before any training."""
    names = {
        "halo_converted": "halo block, from the weights",
        "halo_started": "halo block, measured",
        "delta_conv_started": "ΔConvBlock, measured",
        "mean_only_started": "mean token",
    }
    lines = [
        [row["layer"].removesuffix(".attn1"), *(f"{float(row[name]):.2f}" for name in names)]
        for row in read("video_locality.csv")
        if row["model"] == "teacher"
    ]
    return table(["layer", *names.values()], lines)


def latency_video() -> str:
    """One site of Wan-1.3B on a CPU, at three sizes, and how times grow with the tokens."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    peaks: dict[str, dict[int, float]] = defaultdict(dict)
    for row in measured("latency_video.csv"):
        if row.median_ms is not None:
            found[row.variant][row.tokens] = row.median_ms
            peaks[row.variant][row.tokens] = row.peak_mib or 0.0
    sizes = sorted(found[ATTENTION])
    lines = []
    for variant in (ATTENTION, *NAMES):
        own = found[variant]
        times = [f"{milliseconds(own[n])}, {peaks[variant][n]:,.0f} MiB" for n in sizes]
        lines.append([NAMES.get(variant, variant), *times, f"{fit_growth(own):.2f}"])
    return table(["", *(f"{n:,} tokens" for n in sizes), "time ∝ tokens to the power"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "videos": videos,
    "locality of videos": locality,
    "starts of videos": starts,
    "latency video": latency_video,
}
