"""The second process of `test_evaluate_run.py`, under a launcher's environment."""

import sys

import torch
from test_evaluate_run import make_settings, student, thumbnails

from convfusion.evaluate import evaluate

torch.set_num_threads(1)

evaluate(student(), make_settings(), sys.argv[1], extractor=thumbnails())
