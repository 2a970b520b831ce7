"""The tables of docs/deploy.md: an exported pipeline beside PyTorch, in float32 and in int8."""

from __future__ import annotations

from collections import defaultdict

from pages import one, read, table, which

PIXELS = 4  # along a side of a latent of the embedded model
HEADS = {
    "PyTorch": "PyTorch, float32",
    "onnxruntime, fp32": "onnxruntime, float32",
    "onnxruntime, int8": "onnxruntime, int8",
}


def deployment_errors() -> str:
    """How near a file is, and how large."""
    rows = read("deployment.csv")
    found = [row for row in rows if row["held_out"] == "results"]
    lines = [
        [
            HEADS[row["kind"]],
            f"{float(row['epsilon_error']):.2e}",
            f"{float(row['to_student']):.1e}" if float(row["to_student"]) else "–",
            f"{float(row['psnr']):.1f} dB" if row["psnr"] else "–",
            f"{float(row['psnr_least']):.1f} dB" if row["psnr"] else "–",
            f"{int(row['bytes']) / 1e6:.1f} MB" if row["bytes"] else "–",
        ]
        for row in found
    ]
    heads = ["the student `near`", "ε-error to the teacher", "to the student in PyTorch"]
    heads += ["PSNR to PyTorch's pictures", "the least", "file of the denoiser"]
    errors = {(row["held_out"], row["kind"]): float(row["epsilon_error"]) for row in rows}
    more = {
        name: errors[name, "onnxruntime, int8"] / errors[name, "onnxruntime, fp32"] - 1
        for name in ("results", "choice")
    }
    whole, less = (int(row["bytes"]) for row in found if row["bytes"])
    count = one([row for row in found if row["pictures"]], "pictures")[0]
    return f"""{which(found)}

{table(heads, lines)}

PSNR over {count} pictures of 25 steps from equal noise. In int8 the file is
{1 - less / whole:.0%} smaller, and the ε-error is larger by {more["results"]:.0%}
(on the list `choice`, {more["choice"]:.0%})."""


def deployment_seconds() -> str:
    """CPU time of a call, and how much faster int8 is."""
    by: dict[int, dict[str, dict[str, str]]] = defaultdict(dict)
    found = read("deployment_seconds.csv")
    for row in found:
        by[int(row["side"])][row["kind"]] = row
    lines, own = [], []
    for side, kinds in by.items():
        own.append(f"{1 / float(kinds['PyTorch']['faster_than_fp32']):.2f}×")
        cells = [f"{float(kinds[name]['cpu_ms']):.0f} ms" for name in HEADS]
        less = kinds["onnxruntime, int8"]
        low, high = float(less["faster_low"]), float(less["faster_high"])
        gain = f"{float(less['faster_than_fp32']):.2f}× ({low:.2f}–{high:.2f})"
        lines.append([f"{side * PIXELS}×{side * PIXELS}", *cells, gain])
    [device], [rounds] = one(found, "device"), one(found, "rounds")
    [runtime], [torch] = one(found, "onnxruntime"), one(found, "torch")
    return f"""{table(["pixels", *HEADS.values(), "int8 faster than float32"], lines)}

{device}, one thread, batch 2 (a picture under guidance), onnxruntime {runtime}, PyTorch {torch}.
Medians of {rounds} rounds in turn; in brackets, the middle half of the rounds' ratios. In
float32, onnxruntime is {", ".join(own[:-1])} and {own[-1]} faster than PyTorch."""


TABLES = {"deployment errors": deployment_errors, "deployment seconds": deployment_seconds}
