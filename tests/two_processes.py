"""What each process of `test_processes.py` runs, under a launcher or alone."""

import sys

import torch
from test_resume import converted, samples

from convfusion.distill import DistillConfig, distill

torch.set_num_threads(1)

out, accumulation = sys.argv[1], int(sys.argv[2])
config = DistillConfig(
    steps=3,
    imitation_steps=1,
    batch_size=4,
    accumulation=accumulation,
    checkpointing=True,
    warmup=1,
    learning_rate=1e-2,
    held_out=2,
    validate_every=2,
    ema=0.5,
)
distill(converted(), samples(), config, out)
