"""The second process of `test_evaluate_run.py`, under a launcher's environment."""

import sys

import torch
from test_evaluate_run import draws, student, thumbnails

from convfusion.evaluate import evaluate

torch.set_num_threads(1)

evaluate(student(), draws(), sys.argv[1], extractor=thumbnails())
