"""How local is the self-attention of the small video teacher, in space and in time?

`python recipes/video_locality.py` analyses each layer while captions of the list `choice` are
drawn, of the teacher and of an untrained model of its shape, and writes
`results/video_locality.csv`. Its last columns are imitation errors, before any training, of what
may stand there: a halo block of `HALO` as `convert` sets it and as it starts from the attention, a
ΔConvBlock of the preset and the mean token alone, both as they start. These starts see captions of
the training list.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from convfusion import Halo
from convfusion.analysis import AnalysisConfig, analyze, build_untrained
from convfusion.analysis.study import SiteAnalysis
from convfusion.families import Site, denoiser_of, list_sites
from convfusion.families.watch import sample_attention
from convfusion.fingerprint import fingerprint
from convfusion.generate import swapped_denoiser
from convfusion.mixers import DeltaConv, MeanOnly, Mixer
from convfusion.mixers.tokens import TokenSample
from convfusion.recording import record_calls
from convfusion.surgery import build_mixers, uniform
from convfusion.surgery.start import measure_imitation, start_mixer
from mini.video import FRAMES, GUIDANCE, KEPT, SIZE, clip, load_video
from pages import write

LOOKS = 5  # at each batch of clips, that starts are measured on
WINDOWS = ((1, 3), (3, 3), (3, 5), (5, 5))  # frames and side
HALO = Halo(block=(1, 2, 2), window=(3, 4, 4), cells=(2, 4, 4))  # sees 48 of 320 tokens around
DELTA_CONV = DeltaConv(kernel_size=7, frame_kernel_size=3, first_frame_branch=True)
DRAWN: dict[str, Any] = {"guidance": GUIDANCE, "size": (SIZE, SIZE), "frames": FRAMES}


def measure_locality(pipe: Any, model: str, clips: int, steps: int) -> list[dict[str, Any]]:
    """A row for each self-attention of a pipeline, from so many clips in so many steps."""
    captions = [clip("choice", number).caption for number in range(clips)]
    found = analyze(pipe, captions, AnalysisConfig(steps=steps, batch_size=4, **DRAWN))
    errors = measure_starts(pipe, clips, steps)
    teacher = fingerprint(denoiser_of(pipe))[:12]
    return [
        {
            "model": model,
            "teacher": teacher,
            "layer": site.path,
            "grid": "x".join(map(str, site.grid)),
            **describe_site(site),
            **errors[site.path],
        }
        for site in found.sites
    ]


def describe_site(site: SiteAnalysis) -> dict[str, Any]:
    """Fields, shares and what gathers, of a layer; shares of uniform attention beside each."""
    mean, frames, places = site.mean, site.frames, site.single.gathering
    assert frames is not None and mean.frames is not None
    row: dict[str, Any] = {
        "field": mean.receptive_field,
        "uniform_field": site.uniform_receptive_field,
        "frames_field": mean.frames.receptive_field,
        "uniform_frames_field": frames.uniform_receptive_field,
        "own_frame": rounded(mean.frames.score_mass[0]),
        "uniform_own_frame": rounded(frames.uniform_score_mass[0]),
    }
    for count, side in WINDOWS:
        name = f"{count}x{side}x{side}"
        row[name] = rounded(frames.within[count // 2][side // 2])
        row[f"uniform_{name}"] = rounded(frames.uniform_within[count // 2][side // 2])
    row["first_frame"] = rounded(places.first_frame)
    row["corners"] = rounded(places.corners)
    row["strongest_hundredth"] = rounded(places.few)
    row["strongest"] = rounded(places.strongest)
    row["entropy"] = rounded(site.single.entropy)
    return row


@torch.no_grad()
def measure_starts(pipe: Any, clips: int, steps: int) -> dict[str, dict[str, float]]:
    """Imitation errors before any training, by path and by what stands there."""
    model = denoiser_of(pipe)
    captions = [clip("train", number).caption for number in range(clips)]
    calls = record_calls(pipe, captions, looks=LOOKS, batch_size=4, steps=steps, **DRAWN)
    sites = list_sites(model)
    with sample_attention(model, [site.path for site in sites], memory=1.0) as samples:
        for call in calls:
            model(**call)
    return {site.path: start_blocks(model, site, samples[site.path]) for site in sites}


def start_blocks(model: Any, site: Site, sample: list[TokenSample]) -> dict[str, float]:
    """Imitation errors of what may stand at a site."""
    attention = model.get_submodule(site.path)

    def build(mixer: Mixer) -> Any:
        return build_mixers(model, [site], uniform(mixer))[site.path]

    started = {"halo": HALO, "delta_conv": DELTA_CONV, "mean_only": MeanOnly()}
    errors = {"halo_converted": measure_imitation(build(HALO), attention, sample)}
    for name, mixer in started.items():
        errors[f"{name}_started"] = start_mixer(site.path, build(mixer), attention, sample)
    return {name: rounded(error) for name, error in errors.items()}


def rounded(value: float | None) -> Any:
    """To four digits."""
    return None if value is None else float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=KEPT, help="folder of the pipeline")
    parser.add_argument("--clips", type=int, default=8, help="of each list")
    parser.add_argument("--steps", type=int, default=10, help="that a clip is drawn in")
    args = parser.parse_args()
    pipe = load_video(args.teacher)
    rows = measure_locality(pipe, "teacher", args.clips, args.steps)
    with swapped_denoiser(pipe, build_untrained(pipe)):
        rows += measure_locality(pipe, "untrained", args.clips, args.steps)
    write("video_locality.csv", rows)


if __name__ == "__main__":
    main()
