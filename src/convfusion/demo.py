"""The whole story on the embedded model: convert, distil live, compare, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from convfusion import mini, presets, report
from convfusion.adapters import denoiser_of
from convfusion.checkpoint import write_text
from convfusion.config import uniform
from convfusion.distill import DistillConfig, LatentDataset, LossWeights, attention_teacher, distill
from convfusion.evaluate import epsilon_error, mean_psnr
from convfusion.flops import flops_ratio
from convfusion.generate import generate
from convfusion.mixers import Removed
from convfusion.surgery import convert, drop_attention

DEMO_STEPS = 400
IMAGE_STEPS = 25
EVALUATED = 64  # held-out latents that ε-errors are measured on
DRAWN = 16  # held-out prompts that are drawn
SHOWN = 10  # of them in the grid

ROWS = {
    "teacher": "teacher, with self-attention",
    "removed": "self-attention removed",
    "distilled": "student distilled just now",
    "shipped": "student shipped",
}


def distillation(steps: int, seed: int = 0) -> DistillConfig:
    """How the embedded model is distilled, live in the demo and for longer in its recipe.

    Small batches at a high rate go furthest in a given time here. The true noise is left out of
    the loss: it pulls towards the data, away from a teacher as small as this one.
    """
    return DistillConfig(
        steps=steps,
        batch_size=16,
        learning_rate=2e-2,
        warmup=20,
        decay=1.0,
        weight_decay=0.0,
        losses=LossWeights(noise=0.0, feature=1e-2),
        seed=seed,
    )


def run_demo(
    out: str | Path,
    config: DistillConfig = distillation(steps=DEMO_STEPS),
    *,
    say: Callable[[str], None] = print,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Run the demo and write `demo.json`, `grid.png` and `report.html` to a folder.

    Errors and pictures are of names, pictures and noises that no training saw.

    Returns:
        What `demo.json` holds.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = spread(mini.held_out_data(), EVALUATED)
    prompts = spread(mini.held_out_data(), DRAWN, offset=0.5).captions

    say("1/4  The pretrained teacher draws the held-out prompts.")
    pictures = {"teacher": draw(mini.load_teacher(), prompts)}
    results: dict[str, Any] = {}

    say("2/4  Every self-attention is removed, and the teacher's pictures fall apart.")
    pipe = mini.load_teacher()
    convert(pipe, uniform(Removed()))
    pictures["removed"] = draw(pipe, prompts)
    results["removed"] = measure(pipe, held_out, pictures["removed"], pictures["teacher"])

    say(f"3/4  ΔConvBlocks take its place and are distilled for {config.steps} steps.")
    student = mini.load_teacher()
    before = parameters(student)
    sites = convert(student, presets.default()).converted
    initial = error(student, held_out)
    losses: list[dict[str, float]] = []

    def keep(step: int, terms: dict[str, float]) -> None:
        losses.append(terms)
        if on_step is not None:
            on_step(step, terms)

    started = time.perf_counter()
    run = distill(student, mini.training_data(), config, on_step=keep)
    if run.stopped:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    pictures["distilled"] = draw(student, prompts)
    results["distilled"] = {
        **measure(student, held_out, pictures["distilled"], pictures["teacher"]),
        "initial_error": initial,
        "steps": run.steps,
        "seconds": round(seconds, 1),
    }
    ratio = flops_ratio(student, (16, 16))
    drop_attention(student)

    say("4/4  The shipped student, distilled for longer by the same code.")
    shipped = mini.load_student()
    pictures["shipped"] = draw(shipped, prompts)
    results["shipped"] = measure(shipped, held_out, pictures["shipped"], pictures["teacher"])

    results |= {
        "sites": sites,
        "parameters": {"before": before, "after": parameters(student)},
        "flops_ratio": ratio,
        "guidance": mini.GUIDANCE,
        "image_steps": IMAGE_STEPS,
        "teacher_sha256": mini.teacher_hash(),
    }
    write_text(folder / "demo.json", json.dumps(results, indent=2) + "\n")
    shown = {ROWS[name]: images[:SHOWN] for name, images in pictures.items()}
    grid = report.labelled_grid(shown, prompts[:SHOWN])
    grid.save(folder / "grid.png")
    write_text(folder / "report.html", report.demo_page(results, grid, losses))
    return results


def spread(data: LatentDataset, most: int, offset: float = 0.0) -> LatentDataset:
    """`most` samples, evenly spread over a data set."""
    picks = [int((k + offset) * len(data) / most) for k in range(most)]
    return LatentDataset(data.latents[picks], [data.captions[i] for i in picks])


def draw(pipe: Any, prompts: list[str]) -> list[Image.Image]:
    """The held-out prompts by equal seeds, steps and guidance."""
    return generate(
        pipe, prompts, steps=IMAGE_STEPS, guidance=mini.GUIDANCE, batch_size=len(prompts)
    )


def error(pipe: Any, data: LatentDataset) -> float:
    """ε-error of a converted pipeline against its own attention, on held-out latents."""
    teacher = attention_teacher(denoiser_of(pipe))
    return epsilon_error(pipe, teacher, data.latents, data.captions)


def measure(
    pipe: Any, data: LatentDataset, images: list[Image.Image], references: list[Image.Image]
) -> dict[str, float]:
    return {"epsilon_error": error(pipe, data), "image_psnr": mean_psnr(images, references)}


def parameters(pipe: Any) -> int:
    """Parameters of a pipeline's denoiser."""
    model: torch.nn.Module = denoiser_of(pipe)
    return sum(p.numel() for p in model.parameters())
