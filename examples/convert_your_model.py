"""Replace the self-attention of a pipeline, look at it, save it, and put the attention back.

python examples/convert_your_model.py                         # the embedded mini model
python examples/convert_your_model.py PIPELINE --out FOLDER   # a diffusers folder or Hub name

The blocks are untrained here, so a pipeline with them draws noise: see distill_your_model.py.
"""

import argparse

from diffusers import DiffusionPipeline

import convfusion
from convfusion import mini

parser = argparse.ArgumentParser(description="Convert a pipeline, save it, revert it.")
parser.add_argument("pipeline", nargs="?", help="default: the embedded mini model")
parser.add_argument("--out", default="run/converted", help="folder for the converted pipeline")
args = parser.parse_args()

if args.pipeline is None:
    pipe = mini.load_teacher()
else:
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True)

status = convfusion.convert(pipe)  # by the preset that fits the model's layout
print(status)

convfusion.save_pipeline(pipe, args.out)  # convfusion.load_pipeline reads it back
print(f"Written: {args.out}")

status = convfusion.revert(pipe)  # bit for bit the model that was loaded
print(f"After revert: {status.converted} of {len(status.sites)} sites converted")
