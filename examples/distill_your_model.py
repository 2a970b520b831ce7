"""Distil the self-attention of a pipeline into ΔConvBlocks, save them, and draw with them.

python examples/distill_your_model.py --steps 200        # the embedded mini model and its data
python examples/distill_your_model.py PIPELINE --data pictures --steps 10000

PIPELINE is a diffusers folder or a name on the Hub. `pictures` is a folder of pictures, each with
its caption in NAME.txt beside it; docs/data.md lists what else it may be. Pictures and captions
are encoded once, into OUT/cache. The blocks are in OUT at the end: convfusion.load reads them.
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
parser.add_argument("--data", default="pictures", help="pictures and captions for PIPELINE")
parser.add_argument("--size", type=int, default=512, help="side of the training pictures")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="run/blocks", help="folder for the blocks and logs")
args = parser.parse_args()

if args.pipeline is None:
    pipe, data = mini.load_teacher(), mini.training_data()
else:
    source = open_source(args.data)  # before the model is loaded: a wrong name shows at once
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    data = build_cache(pipe, source, f"{args.out}/cache", size=(args.size, args.size))

convfusion.convert(pipe)  # untrained blocks in place of every self-attention
result = distill(pipe, data, DistillConfig(steps=args.steps), args.out)
print(f"{result.steps} steps in {result.seconds:.0f} s, last losses {result.losses}")

picture = f"{args.out}/picture.png"
generate(pipe, data.captions[:1])[0].save(picture)
print(f"Written: the blocks in {args.out}, and {picture}")
