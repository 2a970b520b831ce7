"""The tables of docs/highres.md: ways to climb a rung, distances of large pictures, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from pages import read, table, which


def rungs() -> str:
    """What one rung of the student does in each way, where the truth is known and beyond."""
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in read("highres_rungs.csv"):
        if row["model"] == "student":
            found[row["enlarged"], row["strength"], row["guidance"]][row["to"]] = row
    least = float(found["the true picture", "0.0", "1.0"]["64"]["kernel_truth"])
    heads = ["what is enlarged", "strength", "guidance", "PSNR, truth", "kernel distance ·10³"]
    heads += ["sharpness", "PSNR, below, at 128", "sharpness, at 128"]
    lines = []
    for (way, strength, guidance), by in found.items():
        near, far = by["64"], by.get("128", {"psnr_below": "–", "sharpness": "–"})
        drawn = float(strength) > 0
        cells = [strength, f"{float(guidance):g}"] if drawn else ["–", "–"]
        cells += [near["psnr_truth"] if way != "the true picture" else "–"]
        cells += [f"{1e3 * (float(near['kernel_truth']) - least):.1f}", near["sharpness"]]
        lines.append([way, *cells, far["psnr_below"], far["sharpness"]])
    return f"""{which(read("highres_rungs.csv"))}

{table(heads, lines)}

From 32 pixels to 64, {near["pictures"]} held-out pictures, and in the last two columns from 64 to
128, half as many; the student, 25 steps. "Low kept" puts the low frequencies back. The kernel
distance is that from the true pictures, less what those have from themselves. From
[results/highres_rungs.csv](../results/highres_rungs.csv), written by
`python recipes/highres.py rungs`; student `{near["weights"]}`."""


def distances() -> str:
    """Kernel and Fréchet distances of every set to both references."""
    rows = read("highres_distances.csv")
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        found[row["side"], row["way"], row["model"]][row["reference"]] = row
    names = list(dict.fromkeys(row["reference"] for row in rows))
    heads = ["pixels", "drawn", "by", "pictures"]
    heads += [f"{kind}, {name}" for name in names for kind in ("kernel distance ·10³", "Fréchet")]
    most = max(int(row["samples"]) for row in rows)
    lines = []
    for (side, way, model), by in found.items():
        row, cells = by[names[0]], []
        for name in names:
            value, error = (1e3 * float(by[name][key]) for key in ("kernel", "kernel_error"))
            comparable = int(row["samples"]) == most
            cells.append(f"{value:.1f} ± {error:.1f}".replace("-", "−"))
            cells.append(f"{float(by[name]['frechet']):.0f}" if comparable else "–")
        lines.append([f"{side}×{side}", way, model, row["samples"], *cells])
    sizes = [by[name]["reference_samples"] for name in names]
    return f"""{which(rows)}

{table(heads, lines)}

Shrunk to 64×64; features of {row["network"]}; {" and ".join(sizes)} pictures of reference. A
Fréchet distance falls with the number of pictures, so that only those of equal numbers stand here;
the first row is its floor. From [results/highres_distances.csv](../results/highres_distances.csv),
written by `python recipes/highres.py distances`."""


def errors() -> str:
    """ε-errors of the student beyond its own size."""
    rows = read("highres_errors.csv")
    heads = ["pixels", "ε-error", "at timesteps 50, 150, 250"]
    lines = [
        [f"{row['side']}×{row['side']}", *(f"{float(row[n]):.1e}" for n in ("error", "error_late"))]
        for row in rows
    ]
    return f"""{which(rows)}

{table(heads, lines)}

{rows[0]["samples"]} held-out pictures, enlarged by Lanczos; from
[results/highres_errors.csv](../results/highres_errors.csv), written by
`python recipes/highres.py errors`."""


def memory() -> str:
    """Estimated and measured peaks; where only the estimate is there, what would be measured."""
    rows = read("highres.csv")
    rows.sort(key=lambda row: (row["part"], row["feed_forward"], area(row)))
    chunked = (row for row in rows if row["feed_forward"] == "chunks" and row["measured_gib"])
    top = max(chunked, key=area)
    heads = ["pixels", "what", "feed-forward", "estimate, GiB", "measured, GiB", "ratio"]
    lines = []
    for row in rows:
        cells = [row["size"].replace("x", "×"), row["part"]]
        cells += [row["feed_forward"] if row["part"] == "denoiser" else "–"]
        estimate = float(row["estimated_gib"])
        if row["measured_gib"]:
            peak = float(row["measured_gib"])
            cells += [f"{estimate:.2f}", f"{peak:.2f}", f"{peak / estimate:.2f}"]
        else:
            peak = float(top["measured_gib"]) * area(row) / area(top)
            cells += [f"{estimate:.2f}", f"extrapolated: {peak:.1f}", "–"]
        lines.append(cells)
    return f"""{table(heads, lines)}

One sample in {top["dtype"]}, weights not counted. What is extrapolated is the measured peak at
{top["size"].replace("x", "×")}, times the ratio of pixels. From
[results/highres.csv](../results/highres.csv); PyTorch {top["torch"]}."""


def area(row: dict[str, str]) -> int:
    """Pixels."""
    width, height = row["size"].split("x")
    return int(width) * int(height)


TABLES: dict[str, Callable[[], str]] = {
    "highres rungs": rungs,
    "highres distances": distances,
    "highres errors": errors,
    "highres memory": memory,
}
