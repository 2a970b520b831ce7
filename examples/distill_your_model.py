"""Distil the self-attention of a pipeline into ΔConvBlocks, save them, and draw with them.

python examples/distill_your_model.py --steps 200        # the embedded mini model and its data
python examples/distill_your_model.py PIPELINE --data FOLDER --steps 10000

FOLDER holds pictures, each with its caption in NAME.txt beside it; docs/data.md has what else it
may be. Pictures and captions are encoded once, into OUT/cache.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import convfusion
from convfusion import mini
from convfusion.data import build_cache, open_source
from convfusion.distill import DistillConfig, distill
from convfusion.generate import generate

parser = argparse.ArgumentParser(description="Distil a pipeline's self-attention.")
parser.add_argument("pipeline", nargs="?", help="default: the embedded mini model")
parser.add_argument("--data", default="data", help="pictures and captions for PIPELINE")
parser.add_argument("--size", type=int, default=512, help="side of the training pictures")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="run/blocks", help="folder for the blocks and logs")
args = parser.parse_args()
if args.pipeline is None:
    pipe, data = mini.load_teacher(), mini.training_data()
else:
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    source, size = open_source(args.data), (args.size, args.size)
    data = build_cache(pipe, source, f"{args.out}/cache", size=size)
convfusion.convert(pipe)
result = distill(pipe, data, DistillConfig(steps=args.steps), args.out)
print(f"{result.steps} steps, last losses {result.losses}; blocks in {args.out}")
generate(pipe, data.captions[:1])[0].save(f"{args.out}/picture.png")
