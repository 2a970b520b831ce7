"""Step 7: the second teacher, a `PixArtSigmaPipeline` on the same pictures and captions.

`python pixart.py package --run run` keeps what `teacher.py --family pixart` trained, in float16,
in `pixart/` beside this file: transformer, text encoder and tokenizer. The autoencoder is that of
the embedded model. `python pixart.py build FOLDER` puts both together into a pipeline for
`convfusion analyze FOLDER` and the other commands.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import PixArtSigmaPipeline

from convfusion import mini
from convfusion.checkpoint.pipelines import in_dtype

KEPT = Path(__file__).parent / "pixart"


def load_pixart() -> PixArtSigmaPipeline:
    """The trained pipeline, on the CPU in float32."""
    pipe = PixArtSigmaPipeline.from_pretrained(
        KEPT,
        vae=mini.load_teacher().vae,
        **in_dtype(torch.float32),
        local_files_only=True,
        use_safetensors=True,
    )
    pipe.transformer.eval()
    return pipe


def package(run: Path) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(run / "teacher-pixart", **in_dtype(torch.float16))
    shutil.rmtree(KEPT, ignore_errors=True)
    pipe.save_pretrained(KEPT)
    shutil.rmtree(KEPT / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("package").add_argument("--run", type=Path, default=Path("run"))
    commands.add_parser("build").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "package":
        package(args.run)
    else:
        load_pixart().save_pretrained(args.folder)


if __name__ == "__main__":
    main()
