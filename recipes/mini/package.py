"""Step 5: put the teacher, and the latents that the demo needs, into the package.

`python package.py --run run` writes float16 weights to
`src/convfusion/mini/teacher`, and to `src/convfusion/mini/data` the latents of 512 training
pictures and of every held-out name in both designs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import caption, load_pictures
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from teacher import encode

from convfusion.checkpoint.pipelines import in_dtype
from convfusion.mini import DATA, TEACHER

TRAIN_PICTURES = 512


def latents_of(run: Path, side: str, pipe: StableDiffusionPipeline, most: int | None) -> tuple:
    """Latents (float16) and captions of one side: plain pictures, evenly spread over the names."""
    pictures = load_pictures(run, side)
    plain = [i for i, row in enumerate(pictures.rows) if not row["tone"]]
    if most:
        plain = [plain[k * len(plain) // most] for k in range(most)]
    latents = encode(pipe.vae, pictures.images[plain], "cpu")
    return latents.half(), [caption(pictures.rows[i]) for i in plain]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    run = parser.parse_args().run
    pipe = StableDiffusionPipeline.from_pretrained(run / "teacher", **in_dtype(torch.float16))
    shutil.rmtree(TEACHER, ignore_errors=True)
    pipe.save_pretrained(TEACHER)
    pipe.to(torch.float32)  # the latents of the packaged weights, not of the trained ones
    train, train_captions = latents_of(run, "train", pipe, TRAIN_PICTURES)
    held, held_captions = latents_of(run, "held_out", pipe, None)
    DATA.mkdir(exist_ok=True)
    save_file({"train": train, "held_out": held}, DATA / "latents.safetensors")
    split = json.loads((run / "names.json").read_text())
    names = {row["name"] for row in split["pictures"]}
    facts = {
        "held_out_names": split["held_out"],
        "training_names": sorted(names - set(split["held_out"])),
        "train": train_captions,
        "held_out": held_captions,
    }
    text = json.dumps(facts, indent=0, ensure_ascii=False) + "\n"
    (DATA / "captions.json").write_text(text, encoding="utf-8")
    size = sum(f.stat().st_size for f in TEACHER.rglob("*") if f.is_file())
    print(f"teacher {size / 1e6:.1f} MB, {len(train)} + {len(held)} latents")


if __name__ == "__main__":
    main()
