"""The whole story on the embedded model: convert, distil live, compare, report."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from convfusion import mini, report
from convfusion.data import LatentDataset
from convfusion.distill import DistillConfig, DistillResult, LossWeights, distill
from convfusion.evaluate import epsilon_error, mean_psnr
from convfusion.families import denoiser_of
from convfusion.files import write_picture, write_text
from convfusion.generate import generate
from convfusion.mixers import Removed
from convfusion.operations import operations_ratio
from convfusion.surgery import attention_teacher, convert, drop_attention, presets
from convfusion.surgery.config import uniform

DEMO_STEPS = 400
LATENTS = (16, 16)  # the embedded model's
IMAGE_STEPS = 25
EVALUATED = 64  # latents of the list `results` that ε-errors are measured on
DRAWN = 16  # prompts of that list that are drawn
SHOWN = 10  # of them in the grid

ROWS = {
    "teacher": "teacher, with self-attention",
    "removed": "self-attention removed",
    "distilled": "student distilled just now",
    "shipped": "student shipped",
}


def configure_distillation(steps: int, seed: int = 0) -> DistillConfig:
    """How the embedded model is distilled, live in the demo and for longer in its recipe.

    Small batches at a high rate go furthest in a given time here. The true noise is left out of
    the loss: it pulls towards the data, away from a teacher as small as this one. So high a γ
    weighs every timestep alike, as the reported ε-error does.
    """
    return DistillConfig(
        steps=steps,
        batch_size=16,
        learning_rate=2e-2,
        warmup=min(20, steps),
        decay=1.0,
        weight_decay=0.0,
        start="attention",
        imitation_steps=steps // 8,
        losses=LossWeights(noise=0.0, feature=1e-2, snr_gamma=1e9),
        seed=seed,
    )


def run_demo(
    out: str | Path,
    config: DistillConfig = configure_distillation(steps=DEMO_STEPS),
    *,
    say: Callable[[str], None] = print,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Run the demo and write `demo.json`, `grid.png` and `report.html` to a folder.

    Errors and pictures are of names, pictures and noises that no training saw, and that nothing was
    chosen on.

    Returns:
        What `demo.json` holds.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = spread(mini.held_out_data("results"), EVALUATED)
    prompts = spread(mini.held_out_data("results"), DRAWN, offset=0.5).captions
    pictures: dict[str, list[Image.Image]] = {}
    results: dict[str, Any] = {}

    def judge(name: str, pipe: Any) -> None:
        pictures[name] = draw(pipe, prompts)
        psnr = mean_psnr(pictures[name], pictures["teacher"], prompts)
        results[name] = {"epsilon_error": measure_error(pipe, held_out)}
        results[name] |= {"image_psnr": psnr.value, "image_psnr_error": psnr.error}

    say("1/4  The pretrained teacher draws the held-out prompts.")
    pictures["teacher"] = draw(mini.load_teacher(), prompts)

    say("2/4  Every self-attention is removed, and the teacher's pictures fall apart.")
    removed = mini.load_teacher()
    convert(removed, uniform(Removed()))
    judge("removed", removed)

    say(f"3/4  ΔConvBlocks take its place and are distilled for {config.steps} steps.")
    student = mini.load_teacher()
    before = count_parameters(student)
    sites = convert(student, presets.get_preset("default")).converted
    initial = measure_error(student, held_out)
    run, losses = distil_live(student, config, on_step)
    judge("distilled", student)
    results["distilled"] |= {
        "initial_error": initial,
        "steps": run.steps,
        "seconds": round(run.seconds, 1),
    }

    say("4/4  The shipped student, distilled for longer by the same code.")
    shipped = mini.load_student()
    judge("shipped", shipped)
    results["shipped"]["flops_ratio"] = operations_ratio(shipped, LATENTS)

    results |= {"sites": sites} | measure_savings(student, before)
    shown = {ROWS[name]: images[:SHOWN] for name, images in pictures.items()}
    write_results(folder, results, report.draw_grid(shown, prompts[:SHOWN]), losses)
    return results


def measure_savings(student: Any, before: int) -> dict[str, Any]:
    """What the live student saves, and what the results rest on. Its attention is dropped."""
    ratio = operations_ratio(student, LATENTS)
    drop_attention(student)
    return {
        "flops_ratio": ratio,
        "parameters": {"before": before, "after": count_parameters(student)},
        "guidance": mini.GUIDANCE,
        "image_steps": IMAGE_STEPS,
        "teacher_sha256": mini.teacher_hash(),
        "held_out": "results",
    }


def write_results(
    folder: Path, results: dict[str, Any], grid: Image.Image, losses: list[dict[str, float]]
) -> None:
    """Write `grid.png`, `report.html` and `demo.json`."""
    write_picture(folder / "grid.png", grid)
    write_text(folder / "report.html", render_page(results, grid, losses))
    write_text(folder / "demo.json", json.dumps(results, indent=2) + "\n")


def distil_live(
    student: Any, config: DistillConfig, on_step: Callable[[int, dict[str, float]], None] | None
) -> tuple[DistillResult, list[dict[str, float]]]:
    """Distil on the embedded training latents; returns the result and the terms of each step."""
    losses: list[dict[str, float]] = []

    def keep(step: int, terms: dict[str, float]) -> None:
        losses.append(terms)
        if on_step is not None:
            on_step(step, terms)

    run = distill(student, mini.training_data(), config, on_step=keep)
    if run.stopped:
        raise KeyboardInterrupt
    return run, losses


def spread(data: LatentDataset, most: int, offset: float = 0.0) -> LatentDataset:
    """`most` samples, evenly spread over a data set."""
    picks = [int((k + offset) * len(data) / most) for k in range(most)]
    return LatentDataset(data.latents[picks], [data.captions[i] for i in picks])


def draw(pipe: Any, prompts: list[str]) -> list[Image.Image]:
    """The held-out prompts by equal seeds, steps and guidance."""
    return generate(
        pipe, prompts, steps=IMAGE_STEPS, guidance=mini.GUIDANCE, batch_size=len(prompts)
    )


def measure_error(pipe: Any, data: LatentDataset) -> float:
    """ε-error of a converted pipeline against its own attention, on held-out latents."""
    teacher = attention_teacher(denoiser_of(pipe))
    return epsilon_error(pipe, teacher, data.latents, data.captions)


def count_parameters(pipe: Any) -> int:
    """Parameters of a pipeline's denoiser."""
    model: torch.nn.Module = denoiser_of(pipe)
    return sum(p.numel() for p in model.parameters())


def render_page(
    results: Mapping[str, Any], grid: Image.Image, losses: list[dict[str, float]]
) -> str:
    """The demo's results as a page that needs no other file."""
    distilled = results["distilled"]
    body = f"""<h1>A diffusion model without self-attention</h1>
{report.show_verdict(give_verdict(results))}
<p>All {results["sites"]} self-attention layers of a pretrained text-to-image model were replaced by
ΔConvBlocks and distilled for {distilled["steps"]} steps ({distilled["seconds"]:.0f} s).
The prompts below, and the pictures and noises behind the numbers, were seen by no training.</p>
{report.show_picture(grid, "Pictures by prompt and model")}
<p class="note">{report.HINT}</p>
<h2>Distance to the teacher</h2>
{_results_table(results)}
<p class="note">ε-error: how far the predicted noise ε̂ is from the teacher’s ε̃, the mean of
‖ε̂ − ε̃‖² / ‖ε̃‖² over held-out pictures, timesteps and noises; 0 is equal.
PSNR: mean over pictures drawn from equal seeds in {results["image_steps"]} steps at guidance
{results["guidance"]:g}, with its standard error; higher is closer.
Teacher {results["teacher_sha256"][:12]}.</p>
<h2>Cost</h2>
<p>Self-attention takes {results["flops_ratio"]:.2f} times the operations of the blocks at the
16×16 tokens of this small model; the ratio grows with the number of tokens.
Parameters of the denoiser: {results["parameters"]["before"]:,} before,
{results["parameters"]["after"]:,} after.</p>
<h2>Distillation loss by step</h2>
{report.draw_loss_curve([sum(terms.values()) - terms.get("noise", 0.0) for terms in losses])}
<p class="note">The terms that compare with the teacher: its output and its hidden states.
Logarithmic scale.</p>"""
    return report.fill_page("ConvFusion demo", body)


def give_verdict(results: Mapping[str, Any]) -> str:
    """What the demo shows, in plain sentences."""
    worst = results["removed"]["epsilon_error"]
    live, shipped = (worst / results[name]["epsilon_error"] for name in ("distilled", "shipped"))
    steps = results["distilled"]["steps"]
    if live < 2:
        return (
            "Rows 1 and 4 should look alike; row 2 is the model without self-attention, and row 3 "
            f"the student distilled just now. {steps} steps were too few: its predictions are "
            f"only {live:.1f}× nearer to the teacher's than those of row 2. Those of the "
            f"shipped student, which was distilled for longer, are {shipped:.0f}× nearer."
        )
    return (
        "Rows 1, 3 and 4 should look alike; row 2 is the model without self-attention. The "
        f"predictions of the student distilled just now are {live:.0f}× nearer to the teacher's "
        "than those of row 2; those of the shipped student, which was distilled for longer, "
        f"{shipped:.0f}×."
    )


def _results_table(results: Mapping[str, Any]) -> str:
    names = {
        "removed": "self-attention removed",
        "initial": "blocks, before distillation",
        "distilled": "blocks, distilled just now",
        "shipped": "blocks, shipped",
    }
    worst = results["removed"]["epsilon_error"]
    rows = []
    for key, name in names.items():
        if key == "initial":
            value, psnr = results["distilled"]["initial_error"], "–"
        else:
            value = results[key]["epsilon_error"]
            psnr = report.format_psnr(results[key]["image_psnr"], results[key]["image_psnr_error"])
        rows.append((html.escape(name), f"{value:.2e}", f"1/{worst / value:.1f}", psnr))
    return report.show_table(("", "ε-error", "of removed", "picture PSNR"), rows)
