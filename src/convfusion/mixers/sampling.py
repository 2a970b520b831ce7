"""What an attention computes at a sample of its queries, without a map of N×N numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convfusion.mixers.base import (
    Turn,
    output_heads,
    project_heads,
    projections,
    read_gates,
    score_scale,
)
from convfusion.mixers.offsets import split_queries


@torch.no_grad()
def attend_at(attention: Any, tokens: Tensor, chosen: Tensor, turn: Turn | None = None) -> Tensor:
    """The output of an attention at some queries, in float32: [B, N, C] → [B, Q, C].

    Args:
        attention: a diffusers attention.
        tokens: all of them, of any device and dtype.
        chosen: indices of Q queries.
        turn: the rotary embedding of the attention, where it has one.
    """
    query, key, value = project_heads(attention, tokens, turn)
    weights, bias = output_heads(attention), projections(attention)[3].bias
    gates, parts = read_gates(attention, tokens), []
    maps_of_each = query.shape[0] * query.shape[1]
    for part in split_queries(chosen.to(query.device), maps_of_each, query.shape[2]):
        maps = (query[:, :, part] @ key.transpose(2, 3) * score_scale(attention)).softmax(-1)
        gathered = maps @ value
        if gates is not None:
            gathered = gathered * gates[:, :, part, None]
        parts.append(torch.einsum("bhnd,hcd->bnc", gathered, weights))
    output = torch.cat(parts, dim=1)
    return output if bias is None else output + bias.float()
