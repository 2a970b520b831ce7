"""What an attention computes at a sample of its queries, without a map of N×N numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from convfusion.mixers.base import output_heads, project_heads, projections, read_gates, score_scale
from convfusion.mixers.offsets import split_queries
from convfusion.mixers.tokens import TokenSample


@torch.no_grad()
def attend_at(attention: Any, given: TokenSample, chosen: Tensor) -> Tensor:
    """The output of an attention at some queries, in float32: [B, Q, C].

    Args:
        attention: a diffusers attention.
        given: what it was seen with, on any device and in any dtype.
        chosen: indices of Q queries, of the image's where a text shares the attention.
    """
    query, key, value = project_heads(attention, given)
    scores_bias: Any = 0
    if given.joint is not None:
        text = given.joint.text
        key = torch.cat([key, text.key.to(key)], dim=2)
        value = torch.cat([value, text.value.to(value)], dim=2)
        if given.joint.bias is not None:
            scores_bias = pad(given.joint.bias.to(key), (query.shape[2], 0))
    weights, bias = output_heads(attention), projections(attention)[3].bias
    gates, parts = read_gates(attention, given.tokens), []
    maps_of_each = query.shape[0] * query.shape[1]
    for part in split_queries(chosen.to(query.device), maps_of_each, query.shape[2]):
        scores = query[:, :, part] @ key.transpose(2, 3) * score_scale(attention) + scores_bias
        gathered = scores.softmax(-1) @ value
        if gates is not None:
            gathered = gathered * gates[:, :, part, None]
        parts.append(torch.einsum("bhnd,hcd->bnc", gathered, weights))
    output = torch.cat(parts, dim=1)
    return output if bias is None else output + bias.float()
