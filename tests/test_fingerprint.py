"""The name of a set of weights."""

import copy

import torch
from torch import nn

from convfusion.fingerprint import fingerprint


def test_fingerprint_follows_values_names_and_dtypes():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    one = fingerprint(module)
    assert fingerprint(copy.deepcopy(module)) == one
    assert fingerprint(nn.ModuleDict({"a": module})) != one
    assert fingerprint(copy.deepcopy(module).double()) != one
    assert fingerprint(module, module) != one
    with torch.no_grad():
        module[0].weight[1, 2] += 1e-6
    assert fingerprint(module) != one
