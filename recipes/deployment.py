"""An exported pipeline in onnxruntime: its pictures, its errors, its seconds, and the same in int8.

`python recipes/deployment.py` exports the embedded model's student `near` whole, puts the matrix
products of its denoiser in int8 as `convfusion export --pipeline --int8` does, and writes

- `results/deployment.csv`: the ε-error to the teacher and to the student in PyTorch, on the lists
  `choice` and `results`; the PSNR of pictures to those of PyTorch from equal noise; bytes.
- `results/deployment_seconds.csv`: one call of the denoiser at several sizes on one thread. All
  take turns, and the CPU time of the thread is the figure to compare.
"""

from __future__ import annotations

import argparse
import runpy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from convfusion import mini
from convfusion.bench.timing import processor
from convfusion.demo import spread
from convfusion.evaluate.epsilon import TIMESTEPS, predictions, relative_error
from convfusion.evaluate.images import psnr
from convfusion.export import export_pipeline
from convfusion.export.int8 import quantise
from convfusion.families import encode_conditioning, example_inputs
from convfusion.generate import generate
from convfusion.schedule import noise_schedule
from convfusion.surgery import attention_teacher
from pages import ROOT, write

SIDES = (16, 32, 64)  # of latents that one call is timed at: 64, 128 and 256 pixels
PICTURES = 32
KINDS = ("PyTorch", "onnxruntime, fp32", "onnxruntime, int8")


class FileDenoiser:
    """An ONNX file that is called as a denoiser is."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        feed = {
            "sample": sample.numpy(),
            "timestep": timestep.numpy(),
            "encoder_hidden_states": encoder_hidden_states.numpy(),
        }
        return (torch.from_numpy(self.session.run(None, feed)[0]),)


def measure_errors(pipe: Any, kinds: dict[str, Any], part: mini.HeldOut) -> dict[str, Any]:
    """By kind, the ε-error to the teacher and to the student in PyTorch, on a list."""
    data = mini.held_out_data(part)
    generator = torch.Generator().manual_seed(123_456)  # as `epsilon_error` has it
    noises = {t: torch.randn(data.latents.shape, generator=generator) for t in TIMESTEPS}
    told = encode_conditioning(pipe, data.captions, (64, 64))
    schedule = noise_schedule(pipe.scheduler, pipe.unet)
    teacher = attention_teacher(pipe.unet)
    seen = {
        name: predictions(model, schedule, data.latents, noises, told)
        for name, model in {**kinds, "teacher": teacher}.items()
    }

    def error(name: str, reference: str) -> str:
        pairs = zip(seen[name], seen[reference], strict=True)
        return f"{torch.stack([relative_error(*pair) for pair in pairs]).mean().item():.4e}"

    return {name: (error(name, "teacher"), error(name, KINDS[0])) for name in kinds}


def measure_pictures(pipe: Any, folders: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """By kind, the mean and least PSNR in dB to PyTorch's pictures from equal noise."""
    prompts = spread(mini.held_out_data("results"), PICTURES).captions
    noise = torch.randn(PICTURES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = generate(pipe, prompts, guidance=mini.GUIDANCE, latents=noise)
    example = runpy.run_path(str(ROOT / "examples" / "onnx_generate.py"))
    found = {}
    for name, folder in folders.items():
        drawer = example["Pipeline"](folder)
        drawn = drawer.draw(prompts, noise.numpy(), drawer.sampler(25), mini.GUIDANCE)
        # Equal pictures count as a difference of one in a single value, the least there can be.
        most = 10 * np.log10(255**2 * np.asarray(drawn[0]).size)
        values = [min(psnr(*pair), most) for pair in zip(drawn, expected, strict=True)]
        found[name] = (f"{statistics.mean(values):.2f}", f"{min(values):.2f}")
    return found


@torch.no_grad()
def measure_seconds(model: Any, files: dict[str, FileDenoiser], rounds: int) -> list[dict]:
    """Rows of one call each, batch 2, which is a picture under guidance."""
    rows = []
    for side in SIDES:
        inputs = example_inputs(model, (side, side), batch=2, words=24)
        calls: dict[str, Callable[[], Any]] = {KINDS[0]: lambda given=inputs: model(**given)}
        calls |= {name: lambda f=file, given=inputs: f(**given) for name, file in files.items()}
        spent: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, run in calls.items():
                start = time.thread_time()
                run()
                if turn:  # the first warms up
                    spent[name].append(time.thread_time() - start)
        for name, seconds in spent.items():
            pairs = zip(spent[KINDS[1]], seconds, strict=True)
            ratios = sorted(reference / own for reference, own in pairs)
            rows.append(
                {
                    "kind": name,
                    "side": side,
                    "batch": 2,
                    "rounds": rounds,
                    "cpu_ms": f"{1000 * statistics.median(seconds):.2f}",
                    "cpu_least_ms": f"{1000 * min(seconds):.2f}",
                    "faster_than_fp32": f"{statistics.median(ratios):.3f}",
                    "faster_low": f"{ratios[len(ratios) // 4]:.3f}",
                    "faster_high": f"{ratios[-1 - len(ratios) // 4]:.3f}",
                    "device": processor(),
                    "threads": 1,
                    "onnxruntime": onnxruntime.__version__,
                    "torch": torch.__version__,
                }
            )
            print(*list(rows[-1].values())[:9], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of the timed calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = mini.load_student()
    with tempfile.TemporaryDirectory() as place:
        folders = {KINDS[1]: Path(place) / "fp32", KINDS[2]: Path(place) / "int8"}
        export_pipeline(pipe, folders[KINDS[1]], guidance=mini.GUIDANCE)
        shutil.copytree(folders[KINDS[1]], folders[KINDS[2]])
        paths = {name: folder / "unet" / "model.onnx" for name, folder in folders.items()}
        quantise(paths[KINDS[2]])
        files = {name: FileDenoiser(path) for name, path in paths.items()}
        write("deployment_seconds.csv", measure_seconds(pipe.unet, files, args.rounds))
        pictures = {KINDS[0]: ("", ""), **measure_pictures(pipe, folders)}
        kinds = {KINDS[0]: pipe.unet, **files}
        rows = []
        for part in ("choice", "results"):
            for name, (to_teacher, to_student) in measure_errors(pipe, kinds, part).items():
                mean, least = pictures[name] if part == "results" else ("", "")
                rows.append(
                    {
                        "kind": name,
                        "held_out": part,
                        "epsilon_error": to_teacher,
                        "to_student": to_student,
                        "psnr": mean,
                        "psnr_least": least,
                        "pictures": PICTURES if mean else "",
                        "bytes": paths[name].stat().st_size if name in paths else "",
                    }
                )
                print(*rows[-1].values(), flush=True)
        write("deployment.csv", rows)


if __name__ == "__main__":
    main()
