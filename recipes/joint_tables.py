"""What is counted and measured of joint models, as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

from pages import one, read, table
from speed_tables import tera
from video_tables import mean_of

OURS = "delta_conv 0.5"


def flops() -> str:
    """Image to image, text and whole denoiser of published models, before and after."""
    lines = []
    for row in read("flops_joint.csv"):
        if row["mixer"] == OURS:
            continue
        before, after, alone, alone_after = (
            row[name] for name in ("image_before", "image_after", "alone_before", "alone_after")
        )
        whole = int(row["denoiser_before"]), int(row["denoiser_after"])
        lines.append(
            [
                row["model"],
                f"{row['width']}²",
                f"{tera(before)} → {tera(after)}",
                tera(row["text"]),
                f"{tera(alone)} → {tera(alone_after)}" if int(alone) else "–",
                f"{(int(before) + int(alone)) / whole[0]:.0%}",
                f"{tera(row['denoiser_before'])} → {tera(row['denoiser_after'])}",
                f"**{whole[0] / whole[1]:.2f}×**",
            ]
        )
    heads = ["model", "size", "image to image", "text", "`attn2`", "share", "denoiser", "fewer"]
    return f"""Halo blocks of the preset, in 10¹² operations.

{table(heads, lines)}"""


def students() -> str:
    """Students of the joint teacher, with all its attentions replaced."""
    found = read("joint.csv")
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in found:
        groups[row["blocks"], row["steps"]].append(row)
    lines = []
    for (blocks, steps), own in groups.items():
        errors = [float(row["velocity_error"]) for row in own]
        spread = f" ({min(errors):.2e} … {max(errors):.2e})" if len(errors) > 1 else ""
        lines.append(
            [
                blocks,
                steps,
                f"{statistics.mean(errors):.2e}{spread}",
                mean_of(own, "psnr", "dB"),
                f"{int(own[0]['parameters']):,}",
            ]
        )
    farthest = {row["blocks"]: float(row["velocity_error"]) for row in found if row["steps"] == "0"}
    lines.sort(key=lambda line: (-farthest[line[0]], int(line[1])))
    heads = ["from image to image", "steps", "velocity error", "PSNR of pictures", "parameters"]
    [held_out] = one(found, "held_out")
    return f"""On pictures and captions of the list `{held_out}`, which no training saw.

{table(heads, lines)}"""


def text() -> str:
    """What share of each layer's attention goes to the text."""
    found = read("joint_text.csv")
    times = [name for name in found[0] if name.startswith("t=")]
    lines = [
        [
            row["layer"],
            f"{float(row['share']):.1%} ({float(row['uniform']):.1%})",
            f"{float(row['padding']):.1%}",
            f"{float(row['least_head']):.0%} – {float(row['most_head']):.0%}",
            *(f"{float(row[time]):.1%}" for time in times),
        ]
        for row in found
    ]
    heads = [
        "layer",
        "text (uniform)",
        "padding, part of it",
        "heads",
        *(f"t = {t[2:]}" for t in times),
    ]
    return table(heads, lines)


TABLES: dict[str, Callable[[], str]] = {
    "joint_flops": flops,
    "joint": students,
    "joint_text": text,
}
