"""Write the measured tables of README and docs from `results/`.

`python recipes/tables.py` rewrites what stands between `<!-- name -->` and `<!-- /name -->` in each
page, or with names only these tables; with `--check` it only says which pages are out of date, and
fails if there is one.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args

import deployment_tables
import highres_tables
import joint_tables
import picture_tables
import quality_tables
import speed_tables
import training_tables
import video_tables
from convfusion.demo import list_results, tell_shares
from convfusion.mini import Student
from convfusion.report import format_psnr
from pages import RESULTS, ROOT, one, read, table, which

SHIPPED = get_args(Student)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def mean_and_spread(values: list[float]) -> str:
    """Mean and, of several, the range."""
    mean = f"{statistics.mean(values):.3e}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2e} … {max(values):.2e})"


def demo() -> str:
    found = json.loads((RESULTS / "demo.json").read_text())
    heads = ["the model, against its teacher", "ε-error", "of *removed*", "fewer operations"]
    heads.append("PSNR of pictures")
    own = {name: f"{found[name]['parameters'] / 1e6:.2f}M" for name in ("converted", *SHIPPED)}
    return f"""{which([found], "docs/quality.md")}

{table(heads, [list(line) for line in list_results(found)])}

ε-error is the mean of ‖ε̂ − ε̃‖²/‖ε̃‖² over {found["latents"]} pictures of names that no training
saw, ten timesteps and noises; PSNR is the mean over {found["pictures"]} pictures of such names,
with its standard error. They take {found["image_steps"]} deterministic steps at guidance
{found["guidance"]:g}. All {found["sites"]} sites are replaced. The halo blocks were computed from
the attention in {found["converted"]["seconds"]:.1f} seconds and then distilled for
{found["distilled"]["steps"]} steps, the shipped students for longer. Operations are those at this
model's 16×16 tokens; the more tokens, the more are saved. The denoiser has
{found["parameters"] / 1e6:.2f}M parameters, with the halo blocks of the demo {own["converted"]},
with the shipped ΔConvBlocks {own["delta_conv"]}, with the shipped halo blocks {own["near"]}.
From [results/demo.json](results/demo.json), which `make demo` remakes as `out/demo.json`;
teacher `{found["teacher_sha256"][:12]}`."""


def quality() -> str:
    """In a sentence, how close the embedded model's blocks come."""
    found = json.loads((RESULTS / "demo.json").read_text())
    psnr = {
        name: format_psnr(found[name]["image_psnr"], found[name]["image_psnr_error"])
        for name in ("removed", "converted", *SHIPPED)
    }
    told = f"""Beside the teacher's pictures from equal seeds, those of the model without
self-attention have {psnr["removed"]}, with halo blocks that were not trained
{psnr["converted"]}, with the shipped ΔConvBlocks {psnr["delta_conv"]}
and with the shipped halo blocks {psnr["near"]} (mean PSNR over {found["pictures"]} pictures,
with its standard error). {tell_shares(found)}
All on names that no training saw. From [results/demo.json](../results/demo.json)."""
    return textwrap.fill(" ".join(told.split()), 110)


def receptive_fields() -> str:
    rows = [r for r in read("receptive_fields.csv") if (r["side"], r["order"]) == ("32", "2")]
    cutoffs = sorted({r["cutoff"] for r in rows}, key=float)
    heads = ["standard deviation, tokens", "window of the Gaussian"]
    heads += [f"Λ⁺, cut-off {c}" for c in cutoffs] + [f"\\|Λ\\|, cut-off {c}" for c in cutoffs]
    found = defaultdict(dict)
    for row in rows:
        found[row["width"], row["of_itself"]][row["cutoff"]] = row
    lines = [
        [width, own] + [by[c]["positive"] for c in cutoffs] + [by[c]["magnitude"] for c in cutoffs]
        for (width, own), by in found.items()
    ]
    return table(heads, lines)


def kernels() -> str:
    found = defaultdict(list)
    for row in read("kernels.csv"):
        found[row["choice"].replace("|", "\\|")].append(row)
    heads = ["kernels", "K×stages by site", "operations of attention over theirs", "ε-error"]
    lines = []
    for name, rows in found.items():
        ratio = f"{float(rows[0]['flops_ratio']):.2f}"
        errors = mean_and_spread([float(row["epsilon_error"]) for row in rows])
        lines.append([name, rows[0]["kernels_x_stages"], ratio, errors])
    note = f"{rows[0]['steps']} steps; mean and range of {len(rows)} seeds"
    note = f"{note}; teacher `{rows[0]['teacher_sha256']}`."
    return f"{which(read('kernels.csv'))}\n\n{table(heads, lines)}\n\n{note}"


def initialisation() -> str:
    found = defaultdict(lambda: defaultdict(list))
    for row in read("initialisation.csv"):
        found[row["init"]][int(row["step"])].append(float(row["epsilon_error"]))
    steps = sorted(next(iter(found.values())))
    heads = ["init", *(f"after {step}" if step else "before" for step in steps)]
    lines = [[f"`{name}`", *(mean_and_spread(by[s]) for s in steps)] for name, by in found.items()]
    return f"{which(read('initialisation.csv'))}\n\n{table(heads, lines)}"


def efficiency() -> str:
    """Steps and seconds until each recipe is as good as the paper's, and twice as far off."""
    runs = defaultdict(list)
    for row in read("efficiency.csv"):
        runs[row["model"], row["recipe"], row["seed"]].append(row)
    recipes = list(dict.fromkeys(recipe for _, recipe, _ in runs))
    every = {model: complete_seeds(model, runs.keys(), len(recipes)) for model, _, _ in runs}
    seeds = {model: own for model, own in every.items() if own}  # others are under way
    lines = []
    for model, recipe in ((model, recipe) for model in seeds for recipe in recipes):
        cells = []
        for factor in (2.0, 1.2, 1.0):
            reached = []
            for seed in seeds[model]:
                final = float(runs[model, "paper", seed][-1]["epsilon_error"])
                fits = (
                    (int(row["step"]), float(row["seconds"]))
                    for row in runs[model, recipe, seed]
                    if float(row["epsilon_error"]) <= factor * final
                )
                reached.append(min(fits, default=None))
            cells.append(median_of(reached))
        best = [float(runs[model, recipe, s][-1]["epsilon_error"]) for s in seeds[model]]
        lines.append([f"{model}: {recipe}", *cells, mean_and_spread(best)])
    heads = ["recipe", "2 ×", "1.2 ×", "as good as the paper's", "ε-error at its end"]
    lengths = " and ".join(
        f"{one(runs[model, 'paper', own[0]], 'length')[0]} steps on {model}"
        for model, own in seeds.items()
    )
    counts = ", ".join(f"{len(own)} of {model}" for model, own in seeds.items())
    return f"""{which(read("efficiency.csv"))}

{table(heads, lines)}

Steps (and processor seconds) until the ε-error on 32 held-out samples is at most so many times that
of the paper's recipe of the same seed at its end ({lengths}).
Medians of the seeds: {counts}. From
[results/efficiency.csv](../results/efficiency.csv), by `python recipes/efficiency.py`."""


def complete_seeds(model: str, runs: Iterable[tuple[str, str, str]], recipes: int) -> list[str]:
    """The seeds that a model was run with by as many recipes as there are."""
    count = Counter(seed for name, _, seed in runs if name == model)
    return sorted(seed for seed, held in count.items() if held == recipes)


def median_of(reached: list[tuple[int, float] | None]) -> str:
    if None in reached:
        missed = reached.count(None)
        return "not reached" if missed == len(reached) else f"not reached by {missed}"
    steps = sorted(step for step, _ in reached)
    seconds = statistics.median(time for _, time in reached)
    spread = "" if steps[0] == steps[-1] else f" [{steps[0]} … {steps[-1]}]"
    return f"{statistics.median(steps):g}{spread} ({seconds:.0f} s)"


def memory() -> str:
    rows = read("memory.csv")
    heads = ["", "parameters held", "peak", "peak with checkpointing"]
    found = defaultdict(list)
    for row in rows:
        found[row["way"]].append(row)
    ours, theirs = found["one copy"], found["two models"]

    def cells(rows: list[dict[str, str]]) -> list[str]:
        peaks = [f"{float(row['peak_gib']):.2f} GiB" for row in rows]
        return [f"{int(rows[0]['parameters']) / 1e6:.0f}M", *peaks]

    def ratio(key: str, i: int) -> str:
        return f"{float(ours[i][key]) / float(theirs[i][key]):.2f}"

    ratios = [ratio("parameters", 0), ratio("peak_gib", 0), ratio("peak_gib", 1)]
    lines = [
        ["one copy of the frozen weights", *cells(ours)],
        ["two full models", *cells(theirs)],
        ["ratio", *ratios],
    ]
    side = int(rows[0]["latents"])
    return f"""{table(heads, lines)}

Batch 1, latents of {side}×{side}, {rows[0]["dtype"]} on the CPU; the peak is of the process. From
[results/memory.csv](../results/memory.csv), written by `python recipes/memory.py`."""


def pooling() -> str:
    """How far a prediction moves when the blocks pool otherwise than they were trained to."""
    rows = read("pooling.csv")
    heads = ["latents", "change of the prediction", "ε-error, `ceil`", "ε-error, `adaptive`"]
    lines = []
    for row in rows:
        change = float(row["change"])
        errors = [f"{float(row[key]):.2e}" for key in ("student_error", "changed_student_error")]
        none = change < 1e-10  # what float32 rounds
        lines.append(
            [f"{row['height']}×{row['width']}", "none" if none else f"{change:.2e}", *errors]
        )
    return f"""{which(rows)}

{table(heads, lines)}

Mean of ‖ε̂′ − ε̂‖²/‖ε̂‖² over {rows[0]["samples"]} held-out samples of the embedded model and ten
timesteps; its ΔConvBlocks were trained with `ceil`. From
[results/pooling.csv](../results/pooling.csv), written by `python recipes/pooling.py`; teacher
`{rows[0]["teacher_sha256"]}`."""


def layers(folder: str) -> str:
    """The layers of an analysis under docs, beside its untrained control."""
    found, control = (
        json.loads((ROOT / "docs" / folder / f"{name}.json").read_text())["sites"]
        for name in ("analysis", "control")
    )
    heads = ["layer", "grid", "ERF", "untrained", "uniform", "entropy", "high-frequency"]
    heads += ["low-frequency in common", "decay"]
    lines = []
    for site, other in zip(found, control, strict=True):
        mean, decay = site["mean"], site["mean"]["decay"]
        law = "–"
        if decay:
            numbers = {"power": f" {decay['exponent']:.2f}"}
            numbers["exponential"] = f" {decay['length']:.1f}"
            law = decay["best"] + numbers.get(decay["best"], "")
            law += f" (R² {decay['r2'][decay['best']]:.2f})"
        lines.append(
            [
                f"`{short(site['path'])}`" + " *" * site["artefact"],
                "×".join(map(str, site["grid"])),
                *(str(s["mean"]["receptive_field"] or "–") for s in (site, other)),
                str(site["uniform_receptive_field"]),
                f"{mean['entropy']:.2f}",
                f"{mean['high_share']:.0%}",
                f"{mean['bias_share_low']:.0%}",
                law,
            ]
        )
    return table(heads, lines)


def ablation(folder: str) -> str:
    found = json.loads((ROOT / "docs" / folder / "ablation.json").read_text())
    worst = found["removed"]["epsilon_error"]
    lines = [
        [
            name,
            f"{row['epsilon_error']:.2e}",
            f"1/{worst / row['epsilon_error']:.0f}",
            format_psnr(row["psnr"], row["psnr_error"]),
        ]
        for name, row in found.items()
        if row["epsilon_error"]
    ]
    heads = ["in place of self-attention, untrained", "ε-error", "of *removed*", "PSNR"]
    return table(heads, lines)


def curve() -> str:
    found = json.loads((ROOT / "docs" / "curve-mini" / "curve.json").read_text())
    imitation = {site["path"]: site["imitation_error"] for site in found["sites"]}
    alone = {site["path"]: site["epsilon_error"] for site in found["sites"]}
    heads = ["sites replaced"]
    for name in ("imitation error", "ε-error alone"):
        heads += [f"{name}: next site", name, "ε-error so far", "operations gone"]
    lines = []
    for k, points in enumerate(zip(found["by_imitation"], found["by_epsilon"], strict=True), 1):
        line = [str(k)]
        for point, error in zip(points, (imitation, alone), strict=True):
            path = point["site"]
            line += [f"`{short(path)}`", f"{error[path]:.2e}", f"{point['epsilon_error']:.2e}"]
            line.append(f"{point['flops_gone']:.0%}")
        lines.append(line)
    note = f"""{found["training"]["steps"]} steps of stage 1, {found["samples"]} samples held out;
rank correlation of the two errors {found["rank_correlation"]:.2f}; teacher `{found["teacher"]}`."""
    return f"{table(heads, lines)}\n\n{note}"


def budget() -> str:
    with open(ROOT / "docs" / "budget-mini" / "budget.csv", newline="") as file:
        found = list(csv.DictReader(file))
    lines = []
    for row in found:
        predicted = f"{float(row['predicted']):.2e}" if row["predicted"] else "–"
        name = "chosen by moments" if row["choice"] == "moments" else "equal ranks"
        numbers = [f"{float(row['saving']):.2f}×", predicted, f"{float(row['measured']):.2e}"]
        lines.append([name, f"{float(row['budget']):g}x", *numbers])
    return table(["", "budget", "fewer operations", "predicted ε-error", "measured ε-error"], lines)


def short(path: str) -> str:
    """`up_blocks.1.0` for `up_blocks.1.attentions.0.transformer_blocks.0.attn1`."""
    shorter = path.removesuffix(".attn1").removesuffix(".transformer_blocks.0")
    return shorter.replace(".attentions", "")


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "quality": quality,
    "receptive fields": receptive_fields,
    "kernels": kernels,
    "initialisation": initialisation,
    "ablation": partial(ablation, "ablation-mini"),
    "pixart ablation": partial(ablation, "ablation-pixart"),
    "budget": budget,
    "curve": curve,
    "efficiency": efficiency,
    "memory": memory,
    "pooling": pooling,
    "mini": partial(layers, "analysis-mini"),
    "pixart": partial(layers, "analysis-pixart"),
    **deployment_tables.TABLES,
    **highres_tables.TABLES,
    **joint_tables.TABLES,
    **speed_tables.TABLES,
    **training_tables.TABLES,
    **video_tables.TABLES,
    **quality_tables.TABLES,
    **picture_tables.TABLES,
}


def fill(text: str, names: Iterable[str]) -> str:
    """A page with these tables, where it has them, as their results have them now."""
    for name in names:
        marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if marks.search(text):
            text = marks.sub(lambda m, made=TABLES[name](): f"{m[1]}{made}\n{m[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of tables; by default all")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    marks = {name for page in PAGES for name in re.findall("<!-- (\\w[^>]*) -->", page.read_text())}
    if unknown := (marks | set(args.names)) - TABLES.keys():
        sys.exit(f"no table is called {', '.join(sorted(unknown))}")
    names = args.names or list(TABLES)
    stale = [page for page in PAGES if fill(page.read_text(), names) != page.read_text()]
    for page in stale:
        if not args.check:
            page.write_text(fill(page.read_text(), names))
        print(f"{page.relative_to(ROOT)}: {'out of date' if args.check else 'written'}")
    sys.exit(1 if args.check and stale else 0)


if __name__ == "__main__":
    main()
