"""The whole story on the embedded model: convert, distil live, compare, report."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from convfusion import mini, report
from convfusion.data import LatentDataset
from convfusion.distill import DistillConfig, DistillResult, LossWeights, distill
from convfusion.distill.startup import draw_noised_batches
from convfusion.evaluate import epsilon_error, mean_psnr
from convfusion.families import denoiser_of
from convfusion.files import write_picture, write_text
from convfusion.generate import generate
from convfusion.mixers import Removed
from convfusion.operations import operations_ratio
from convfusion.surgery import attention_teacher, convert, start_from_attention, status
from convfusion.surgery.config import ConvertConfig, uniform

DEMO_STEPS, DEMO_RATE = 100, 5e-3
LATENTS = (16, 16)  # the embedded model's
IMAGE_STEPS = 25
EVALUATED = 64  # latents of the list `results` that ε-errors are measured on
DRAWN = 64  # prompts of that list that are drawn
SHOWN = 5  # of them in the grid
BATCH = 16  # of them that are drawn at once
ALIKE = 0.1  # of the error without self-attention: pictures with less look like the teacher's

ROWS = {
    "teacher": "teacher, with self-attention",
    "removed": "self-attention removed",
    "converted": "halo blocks, not trained",
    "distilled": "halo blocks, distilled",
    "delta_conv": "ΔConvBlocks as shipped",
    "near": "halo blocks as shipped",
}
PICTURES = len(ROWS) * DRAWN  # in all
HEADS = ("", "ε-error", "of removed", "fewer operations", "picture PSNR")


def configure_distillation(
    steps: int, seed: int = 0, *, learning_rate: float = 2e-2
) -> DistillConfig:
    """How the embedded model is distilled, live in the demo and for longer in its recipes.

    Small batches at a high rate go furthest in a given time here. The true noise is left out of
    the loss: it pulls towards the data, away from a teacher as small as this one. So high a γ
    weighs every timestep alike, as the reported ε-error does.

    Args:
        steps: of the optimiser.
        seed: of batches, noise and timesteps.
        learning_rate: ΔConvBlocks train best with the default, halo blocks with `DEMO_RATE`.
    """
    return DistillConfig(
        steps=steps,
        batch_size=16,
        learning_rate=learning_rate,
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
    config: DistillConfig = configure_distillation(DEMO_STEPS, learning_rate=DEMO_RATE),
    *,
    say: Callable[[str], None] = print,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_drawn: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run the demo and write `demo.json`, `grid.png` and `report.html` to a folder.

    Errors and pictures are of names, pictures and noises that no training saw, and that nothing was
    chosen on.

    Args:
        out: the folder.
        config: of the live distillation.
        say: is told what begins.
        on_step: is called with the number and the terms of each step of the distillation.
        on_drawn: is called with the number of pictures whenever some are drawn, of `PICTURES`.

    Returns:
        What `demo.json` holds.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    judge = Judge(on_drawn)
    say("1/5  The pretrained teacher draws the held-out prompts.")
    teacher = mini.load_teacher()
    judge.draw("teacher", teacher)

    say("2/5  Every self-attention is removed, and the teacher's pictures fall apart.")
    removed = mini.load_teacher()
    convert(removed, uniform(Removed()))
    judge.measure("removed", removed)

    say("3/5  Halo blocks take its place, computed from its weights and a few of its inputs.")
    student = mini.load_teacher()
    sites = convert(student, load_near_blocks()).converted
    started = time.perf_counter()
    start_from_attention(student, draw_noised_batches(student, mini.training_data()))
    judge.measure("converted", student, seconds=round(time.perf_counter() - started, 1))

    say(f"4/5  These blocks are distilled for {config.steps} steps.")
    run, losses = distil_live(student, config, on_step)
    judge.measure("distilled", student, steps=run.steps, seconds=round(run.seconds, 1))

    say("5/5  The students that come with the package, which were distilled for longer.")
    for name in ("delta_conv", "near"):
        judge.measure(name, mini.load_student(name))

    facts = {"sites": sites, "parameters": count_parameters(teacher)}
    results = judge.results | facts | describe_measurement()
    write_results(folder, results, judge.draw_grid(), losses)
    return results


def describe_measurement() -> dict[str, Any]:
    """What the results rest on."""
    return {
        "guidance": mini.GUIDANCE,
        "image_steps": IMAGE_STEPS,
        "latents": EVALUATED,
        "pictures": DRAWN,
        "teacher_sha256": mini.teacher_hash(),
        "held_out": "results",
    }


def load_near_blocks() -> ConvertConfig:
    """What stands at each site of the shipped near student, which `--budget 3.05x` chose."""
    sites = status(mini.load_student("near")).sites
    return ConvertConfig({row.site.path: row.mixer for row in sites if row.mixer is not None})


class Judge:
    """Draws the held-out prompts with one model after another, and measures how close they are.

    Attributes:
        prompts: that are drawn.
        pictures: of each model, by its key in `ROWS`.
        results: what was measured of each model but the teacher.
    """

    def __init__(self, on_drawn: Callable[[int], None] | None) -> None:
        self.on_drawn = on_drawn
        self.held_out = spread(mini.held_out_data("results"), EVALUATED)
        self.prompts = spread(mini.held_out_data("results"), DRAWN, offset=0.5).captions
        self.pictures: dict[str, list[Image.Image]] = {}
        self.results: dict[str, Any] = {}

    def draw(self, name: str, pipe: Any) -> None:
        """The held-out prompts by equal seeds, steps and guidance."""
        drawn: list[Image.Image] = []
        for start in range(0, len(self.prompts), BATCH):
            part = self.prompts[start : start + BATCH]
            drawn += generate(
                pipe,
                part,
                seeds=list(range(start, start + len(part))),
                steps=IMAGE_STEPS,
                guidance=mini.GUIDANCE,
                batch_size=BATCH,
            )
            if self.on_drawn is not None:
                self.on_drawn(len(part))
        self.pictures[name] = drawn

    def measure(self, name: str, pipe: Any, **facts: Any) -> None:
        """Draw with a converted pipeline, and compare it with its teacher.

        Args:
            name: its key in `ROWS`.
            pipe: with its attention kept.
            facts: further entries of its results.
        """
        self.draw(name, pipe)
        psnr = mean_psnr(self.pictures[name], self.pictures["teacher"], self.prompts)
        self.results[name] = {
            "epsilon_error": measure_error(pipe, self.held_out),
            "image_psnr": psnr.value,
            "image_psnr_error": psnr.error,
            **facts,
        }
        if name != "removed":  # nothing takes no operations
            self.results[name] |= {
                "flops_ratio": operations_ratio(pipe, LATENTS),
                "parameters": count_parameters(pipe),
            }

    def draw_grid(self) -> Image.Image:
        """Some of the pictures, a row for each model."""
        shown = {ROWS[name]: images[:SHOWN] for name, images in self.pictures.items()}
        return report.draw_grid(shown, self.prompts[:SHOWN])


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


def measure_error(pipe: Any, data: LatentDataset) -> float:
    """ε-error of a converted pipeline against its own attention, on held-out latents."""
    teacher = attention_teacher(denoiser_of(pipe))
    return epsilon_error(pipe, teacher, data.latents, data.captions)


def count_parameters(pipe: Any) -> int:
    """Parameters of a pipeline's denoiser, without the attention that mixers stand in for."""
    replaced = [site for site in status(pipe).sites if site.mixer is not None]
    whole = sum(p.numel() for p in denoiser_of(pipe).parameters())
    return whole - sum(site.attention_parameters for site in replaced)


def list_results(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line of cells for each model but the teacher, under `HEADS`, in the order of `ROWS`."""
    worst = results["removed"]["epsilon_error"]
    lines: list[tuple[str, ...]] = []
    for key, name in ROWS.items():
        if key == "teacher":
            continue
        row = results[key]
        lines.append(
            (
                name,
                f"{row['epsilon_error']:.2e}",
                f"1/{worst / row['epsilon_error']:.1f}",
                f"{row['flops_ratio']:.2f}×" if "flops_ratio" in row else "–",
                report.format_psnr(row["image_psnr"], row["image_psnr_error"]),
            )
        )
    return lines


def render_page(
    results: Mapping[str, Any], grid: Image.Image, losses: list[dict[str, float]]
) -> str:
    """The demo's results as a page that needs no other file."""
    converted, distilled = results["converted"], results["distilled"]
    rows = [(html.escape(name), *cells) for name, *cells in list_results(results)]
    return report.fill_page(
        "ConvFusion demo",
        f"""<h1>A diffusion model without self-attention</h1>
{report.show_verdict(give_verdict(results))}
<p>All {results["sites"]} self-attention layers of a pretrained text-to-image model were replaced.
Halo blocks within a budget of 3.05 times fewer operations (the mean token alone where that is
enough) were computed from the attention in {converted["seconds"]:.1f} s, without training, and
then distilled for {distilled["steps"]} steps ({distilled["seconds"]:.0f} s). The two students that
come with the package were distilled for longer. No training saw the prompts below, nor the pictures
and noises behind the numbers.</p>
{report.show_picture(grid, "Pictures by prompt and model")}
<p class="note">{report.HINT}</p>
<h2>Distance to the teacher</h2>
{report.show_table(HEADS, rows)}
<p class="note">ε-error: how far the predicted noise ε̂ is from the teacher’s ε̃, the mean of
‖ε̂ − ε̃‖² / ‖ε̃‖² over {results["latents"]} held-out pictures, timesteps and noises; 0 is equal.
PSNR: mean over {results["pictures"]} pictures drawn from equal seeds in {results["image_steps"]}
steps at guidance {results["guidance"]:g}, with its standard error; higher is closer.
Fewer operations: how many times fewer the blocks take than the self-attention did.
Teacher {results["teacher_sha256"][:12]}.</p>
<h2>Cost</h2>
<p>The operations are those at the 16×16 tokens of this small model. The blocks save more the more
tokens there are: their cost grows with the number of tokens, and that of self-attention with its
square. The denoiser has {results["parameters"]:,} parameters with self-attention,
{distilled["parameters"]:,} with the halo blocks that were distilled here,
{results["delta_conv"]["parameters"]:,} with the ΔConvBlocks that are shipped, and
{results["near"]["parameters"]:,} with the halo blocks that are.</p>
<h2>Distillation loss by step</h2>
{report.draw_loss_curve([sum(terms.values()) - terms.get("noise", 0.0) for terms in losses])}
<p class="note">The terms that compare with the teacher: its output and its hidden states.
Logarithmic scale.</p>""",
    )


def give_verdict(results: Mapping[str, Any]) -> str:
    """What the pictures show, in plain sentences that hold for any results."""
    alike: list[str] = []
    others: list[str] = []
    for number, share in enumerate(list_shares(results).values(), 3):
        (alike if share <= ALIKE else others).append(str(number))
    sentences = ["Row 2 is the teacher of row 1 without its self-attention."]
    if alike:
        sentences.append(f"{_name_rows(alike)} should look like row 1.")
    if others:
        rows = _name_rows(others).lower()
        sentences.append(f"Still too far from row 1 to look like it: {rows}.")
    return " ".join([*sentences, tell_shares(results)])


def tell_shares(results: Mapping[str, Any]) -> str:
    """What each model leaves of the error that no self-attention makes, in a sentence."""
    left = {name: f"{share:.1%}" for name, share in list_shares(results).items()}
    return (
        "Of the error that removing self-attention makes, the halo blocks leave "
        f"{left['converted']} without any training and {left['distilled']} after "
        f"{results['distilled']['steps']} steps; the shipped ΔConvBlocks leave "
        f"{left['delta_conv']}, the shipped halo blocks {left['near']}."
    )


def list_shares(results: Mapping[str, Any]) -> dict[str, float]:
    """By key in `ROWS`, what each model leaves of the error that no self-attention makes."""
    worst = results["removed"]["epsilon_error"]
    return {name: results[name]["epsilon_error"] / worst for name in list(ROWS)[2:]}


def _name_rows(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return f"Row {numbers[0]}"
    return f"Rows {', '.join(numbers[:-1])} and {numbers[-1]}"
